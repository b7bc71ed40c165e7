"""The demo's metrics: distances between sets of pictures, and the share of pictures that show what the caption says."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from typing import TypedDict

import torch
from torch import Tensor

from ..tiny.world import LABELS, Prompt, draw_pictures
from .classifier import Classifier, scene_labels


class Points:
    """Points [N, D], each of a kind [N]; without kinds, each point is its own kind.

    If two samples contain every kind equally often, such as one picture for each caption, only points of different
    kinds are compared. This removes the noise that a random choice of kinds would add.
    """

    def __init__(self, at: Tensor, kinds: Tensor | None = None) -> None:
        """Raises ValueError if `at` does not hold at least two points, or a value is not finite."""
        if at.ndim != 2 or len(at) < 2 or not at.isfinite().all():
            raise ValueError(f"expected at least two points [N, D] of finite values, got {list(at.shape)}")
        self.at, self.kinds = at, kinds

    @cached_property
    def within(self) -> float:
        """The mean distance between two different points."""
        kinds = torch.arange(len(self.at)) if self.kinds is None else self.kinds
        return _mean_distance(self.at, self.at, kinds[:, None] == kinds)

    def to(self, other: Points) -> float:
        """Return the mean distance between a point of this sample and a point of the other."""
        if self.kinds is None or other.kinds is None:
            return torch.cdist(self.at, other.at).mean(dtype=torch.float64).item()
        return _mean_distance(self.at, other.at, self.kinds[:, None] == other.kinds)


def energy_distance(points: Points, reference: Points) -> float:
    """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'|; unbiased, so around 0 for equal distributions (Szekely 2013)."""
    return 2 * points.to(reference) - points.within - reference.within


def _mean_distance(x: Tensor, y: Tensor, apart: Tensor) -> float:
    """Return the mean distance between points [N, D] and [M, D], without the pairs [N, M] that are set in `apart`."""
    distances = torch.cdist(x, y).masked_fill_(apart, 0)
    return distances.sum(dtype=torch.float64).item() / (~apart).sum().item()


class Metrics(TypedDict):
    """Metrics of one picture for each prompt."""

    to_world: float
    """Energy distance to the world's own pictures for the same prompts."""
    to_teacher: float
    """Energy distance to the teacher's pictures for the same prompts."""
    accuracy: float
    """Fraction of pictures that show everything their caption says."""
    accuracy_of: dict[str, float]
    """Fraction of pictures that show each part of the captions that mention it, by the names in `LABELS`."""


class Judge:
    """A classifier, and what the world and the teacher draw for some prompts; pictures are compared with these."""

    def __init__(self, classifier: Classifier, prompts: Sequence[Prompt], world: Tensor, teacher: Tensor) -> None:
        """world, teacher: pictures of all prompts in their order, any number of times, [R * B, 3, 64, 64]."""
        self.classifier, self.prompts = classifier, prompts
        self.world, self.teacher = self.points(classifier.features(world)), self.points(classifier.features(teacher))

    def points(self, features: Tensor) -> Points:
        """Return features of pictures of all prompts, any number of times, [R * B, D], as points of B kinds."""
        rounds, left = divmod(len(features), len(self.prompts))
        if left:
            raise ValueError(f"expected {len(self.prompts)} pictures, one for each prompt, got {len(features)}")
        return Points(features, torch.arange(len(self.prompts)).repeat(rounds))

    def metrics(self, pictures: Tensor) -> Metrics:
        """Measure pictures [B, 3, 64, 64], uint8 or floats in [-1, 1], one for each prompt.

        Raises ValueError if there are not B pictures, or `as_signal` does.
        """
        features = self.classifier.features(pictures)
        points = self.points(features)
        accuracy, accuracy_of = caption_accuracy(self.classifier, features, self.prompts)
        return Metrics(
            to_world=energy_distance(points, self.world),
            to_teacher=energy_distance(points, self.teacher),
            accuracy=accuracy,
            accuracy_of=accuracy_of,
        )


def pixel_difference(pictures: Tensor, others: Tensor) -> float:
    """Return the root mean square difference of the pixels of pictures, uint8 [B, 3, H, W], averaged over pictures."""
    return (pictures.float() - others.float()).square().mean((1, 2, 3)).sqrt().mean().item()


def world_pictures(prompts: Sequence[Prompt], rounds: int, purpose: str) -> Tensor:
    """Draw each prompt `rounds` times, uint8 [rounds * B, 3, 64, 64]; what a caption leaves open is random.

    Different purposes give independent pictures.
    """
    rng = random.Random(purpose)
    allowed = [prompt.scenes() for prompt in prompts]
    return draw_pictures([rng.choice(scenes) for _ in range(rounds) for scenes in allowed], rng)


def caption_accuracy(
    classifier: Classifier, features: Tensor, prompts: Sequence[Prompt]
) -> tuple[float, dict[str, float]]:
    """Return the fraction of pictures that show all that their caption mentions, and the fraction by part of `LABELS`.

    features: of the pictures, [B, D]. A part that no caption mentions has the fraction NaN. Raises ValueError if there
    are not B prompts.
    """
    if len(features) != len(prompts):
        raise ValueError(f"expected one picture for each prompt, got {len(features)} pictures, {len(prompts)} prompts")
    mentioned = torch.tensor([[name in prompt.parts for name in LABELS] for prompt in prompts])
    right = classifier.labels(features) == scene_labels([prompt.scene for prompt in prompts])
    of_parts = (right & mentioned).sum(0).double() / mentioned.sum(0)
    return (right | ~mentioned).all(1).double().mean().item(), dict(zip(LABELS, of_parts.tolist(), strict=True))
