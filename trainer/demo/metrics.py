"""The demo's metrics: Frechet distance to pictures of the shapes world, and the share of correct captions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from ..tiny.world import LABELS, Scene, draw_pictures
from .classifier import NUM_FEATURES, Classifier, scene_labels

FEATURE_SPACE = f"{NUM_FEATURES} features, each of about unit variance, of a classifier of the shapes world"


class Metrics(TypedDict):
    """Metrics of a set of pictures. A Frechet distance also depends on the sample counts and the feature space."""

    frechet: float
    """Squared Frechet distance to the reference pictures."""
    accuracy: float
    """Fraction of pictures that show everything their caption says."""
    accuracy_of: dict[str, float]
    """Fraction of pictures that show each part of their caption, by the names in `LABELS`."""
    samples: int
    reference_samples: int
    feature_space: str


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to features [N, D] and [M, D] (Dowson and Landau 1982).

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), in float64. With C = R^T R, the trace is the minimum of
    |R_a - Q R_b|^2 over orthogonal Q. As a sum of squares, it is zero for equal sets without cancellation, and it needs
    no matrix square root. Raises ValueError for other shapes, fewer than two samples or non-finite values.
    """
    for features in (features_a, features_b):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != features_a.shape[1]:
            raise ValueError(
                "expected two sets of at least two features each, [N, D] and [M, D], "
                f"got {list(features_a.shape)} and {list(features_b.shape)}"
            )
        if not features.isfinite().all():
            raise ValueError("the features hold values that are not finite")
    mean_a, root_a = _gaussian(features_a)
    mean_b, root_b = _gaussian(features_b)
    left, _, right = torch.linalg.svd(root_a @ root_b.T)
    return ((mean_a - mean_b).square().sum() + (root_a - left @ right @ root_b).square().sum()).item()


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [D] of features [N, D], and R [D, D] with R^T R their unbiased covariance, in float64."""
    features = features.double()
    mean = features.mean(0)
    centered = (features - mean) / (len(features) - 1) ** 0.5
    # Rows of zeros do not change the covariance, and make R square if there are fewer samples than features.
    return mean, torch.linalg.qr(F.pad(centered, (0, 0, 0, features.shape[1])), mode="r").R


def caption_accuracy(
    classifier: Classifier, features: Tensor, scenes: Sequence[Scene]
) -> tuple[float, dict[str, float]]:
    """Return the fraction of pictures that show their scene completely, and the fraction for each of `LABELS`.

    features: of the pictures, [B, D]. Raises ValueError if there are not B scenes.
    """
    if len(features) != len(scenes):
        raise ValueError(f"expected one scene for each picture, got {len(features)} pictures and {len(scenes)} scenes")
    right = (classifier.labels(features) == scene_labels(scenes)).double()
    return right.amin(1).mean().item(), dict(zip(LABELS, right.mean(0).tolist(), strict=True))


def evaluate(classifier: Classifier, pictures: Tensor, scenes: Sequence[Scene], reference_features: Tensor) -> Metrics:
    """Evaluate pictures [B, 3, 64, 64], uint8 or floats in [-1, 1], that were sampled for the captions of `scenes`.

    reference_features: [M, D], features of held-out pictures. Raises ValueError if `as_signal`, `caption_accuracy` or
    `frechet_distance` does.
    """
    features = classifier.features(pictures)
    accuracy, accuracy_of = caption_accuracy(classifier, features, scenes)
    return Metrics(
        frechet=frechet_distance(features, reference_features),
        accuracy=accuracy,
        accuracy_of=accuracy_of,
        samples=len(features),
        reference_samples=len(reference_features),
        feature_space=FEATURE_SPACE,
    )


def noise_floor(classifier: Classifier, scenes: Sequence[Scene], reference_features: Tensor, *, seed: int) -> Metrics:
    """Return the metrics of newly drawn pictures of the same scenes: the best values that can be expected."""
    pictures = draw_pictures(scenes, random.Random(f"noise floor {seed}"))
    return evaluate(classifier, pictures, scenes, reference_features)
