"""What the demo measures: how close pictures are to the world, and whether they show what their captions say.

Flows in: pictures, the scenes they were asked for, a classifier.  Flows out: numbers ready for JSON.
"""

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


class Measures(TypedDict):
    """What was measured, and of how many pictures in which space: a Frechet distance means nothing without these."""

    frechet: float
    accuracy: float
    accuracy_of: dict[str, float]
    samples: int
    reference_samples: int
    feature_space: str


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to features [N, D] and [M, D] (Dowson and Landau 1982).

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), in float64. With C = R^T R the trace is the least of
    |R_a - Q R_b|^2 over rotations Q: a sum of squares, so equal sets give zero without cancellation, and no matrix
    is squared or rooted. Raises ValueError for other shapes, fewer than two samples and values that are not finite.
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
    """The mean [D] of features [N, D] and a root R [D, D] of their unbiased covariance R^T R, in float64."""
    features = features.double()
    mean = features.mean(0)
    centered = (features - mean) / (len(features) - 1) ** 0.5
    # Rows of zeros change no covariance and keep the root square when there are fewer samples than features.
    return mean, torch.linalg.qr(F.pad(centered, (0, 0, 0, features.shape[1])), mode="r").R


def caption_accuracy(
    classifier: Classifier, features: Tensor, scenes: Sequence[Scene]
) -> tuple[float, dict[str, float]]:
    """The fraction of pictures, by their features [B, D], that show all of their scene, and each of `LABELS` of it.

    Raises ValueError when there are not as many scenes as features.
    """
    if len(features) != len(scenes):
        raise ValueError(f"expected one scene for each picture, got {len(features)} pictures and {len(scenes)} scenes")
    right = (classifier.labels(features) == scene_labels(scenes)).double()
    return right.amin(1).mean().item(), dict(zip(LABELS, right.mean(0).tolist(), strict=True))


def evaluate(classifier: Classifier, pictures: Tensor, scenes: Sequence[Scene], reference_features: Tensor) -> Measures:
    """Measure pictures [B, 3, 64, 64], bytes or floats in [-1, 1], that were asked for as `scenes`.

    The distance is to the reference features [M, D] of held-out pictures. Raises ValueError as the parts do.
    """
    features = classifier.features(pictures)
    accuracy, accuracy_of = caption_accuracy(classifier, features, scenes)
    return Measures(
        frechet=frechet_distance(features, reference_features),
        accuracy=accuracy,
        accuracy_of=accuracy_of,
        samples=len(features),
        reference_samples=len(reference_features),
        feature_space=FEATURE_SPACE,
    )


def noise_floor(classifier: Classifier, scenes: Sequence[Scene], reference_features: Tensor, *, seed: int) -> Measures:
    """What `evaluate` says of the world itself: fresh pictures of the same scenes, drawn apart from all others."""
    pictures = draw_pictures(scenes, random.Random(f"noise floor {seed}"))
    return evaluate(classifier, pictures, scenes, reference_features)
