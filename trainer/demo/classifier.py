"""A small classifier for the shapes world, which is trained when needed. It gives labels and features of pictures."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..tiny.world import LABELS, SIZE_PX, Scene, all_scenes, draw_pictures

NUM_FEATURES = 64
LOWEST_ACCURACY = 0.97

_BATCH = 64
_MAX_NOISE = 0.3  # standard deviation, for pictures in [-1, 1]
_MAX_BLUR_PX = 2.0
_PEAK_LR = 8e-3


class Classifier(nn.Module):
    """Pictures [B, 3, 64, 64] -> features [B, NUM_FEATURES] -> logits for each of `LABELS`.

    Two more outputs predict how noisy and how blurred a picture is. They are used in training only, so that features
    depend on the picture's quality; trained on labels alone, they would ignore it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(3, 16, stride=2),
            _convolution(16, 24, stride=2),
            _convolution(24, 48, stride=2),
            _convolution(48, 64, stride=1),
            _MaxAndGridPool(),
            nn.Linear(64 + 64 * (SIZE_PX // 16) ** 2, NUM_FEATURES),
            nn.BatchNorm1d(NUM_FEATURES, affine=False),  # unit variance, so that distances have a fixed scale
        )
        self.heads = nn.ModuleDict({name: nn.Linear(NUM_FEATURES, len(values)) for name, values in LABELS.items()})
        self.damage = nn.Linear(NUM_FEATURES, 2)

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """Return features [B, 64] of pictures [B, 3, 64, 64]; raises ValueError as `as_signal` does."""
        return torch.cat([self.body(part) for part in as_signal(pictures).split(256)])

    @torch.no_grad()
    def labels(self, features: Tensor) -> Tensor:
        """Return the most likely class index of each of `LABELS`, [B, 4], for features [B, 64]."""
        return torch.stack([head(features).argmax(1) for head in self.heads.values()], dim=1)


class _MaxAndGridPool(nn.Module):
    """Maps [B, C, H, W] -> [B, F]: global maxima, which do not depend on position, and means over 2 x 2 cells."""

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat([maps.amax((2, 3)), rearrange(F.avg_pool2d(maps, 2), "b c h w -> b (c h w)")], dim=1)


def _convolution(channels_in: int, channels_out: int, *, stride: int) -> nn.Module:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())


def as_signal(pictures: Tensor) -> Tensor:
    """Convert pictures [B, 3, 64, 64] to float32 in [-1, 1]: uint8 is rescaled, floats are clamped.

    Raises ValueError if there are no pictures, the shape or dtype is different, or a value is not finite.
    """
    if pictures.ndim != 4 or pictures.shape[1:] != (3, SIZE_PX, SIZE_PX) or len(pictures) == 0:
        raise ValueError(f"expected pictures [B, 3, {SIZE_PX}, {SIZE_PX}] with B >= 1, got {list(pictures.shape)}")
    if pictures.dtype == torch.uint8:
        return pictures.float() / 127.5 - 1
    if not pictures.is_floating_point():
        raise ValueError(f"expected pictures as uint8 or as floats in [-1, 1], got {pictures.dtype}")
    if not pictures.isfinite().all():
        raise ValueError("the pictures hold values that are not finite; the sampling that made them has diverged")
    return pictures.float().clamp(-1, 1)


def world_sample(count: int, *, purpose: str, seed: int) -> tuple[Tensor, list[Scene]]:
    """Draw `count` random scenes; return pictures, uint8 [count, 3, 64, 64], and scenes.

    Different purposes and seeds give independent scenes.
    """
    rng = random.Random(f"{purpose} {seed}")
    scenes = rng.choices(all_scenes(), k=count)
    return draw_pictures(scenes, rng), scenes


def scene_labels(scenes: Sequence[Scene]) -> Tensor:
    """Return the class indices of scenes, int64 [B, 4], in the order of `LABELS`."""
    return torch.tensor([scene.labels for scene in scenes])


def train_classifier(seed: int, *, steps: int = 800, num_pictures: int = 10_000) -> Classifier:
    """Train a classifier on `num_pictures` newly drawn pictures; the result depends only on the arguments.

    Raises RuntimeError if its accuracy on 1000 held-out pictures is below `LOWEST_ACCURACY` for any of `LABELS`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier()
    _fit(classifier, *world_sample(num_pictures, purpose="classifier", seed=seed), steps=steps, seed=seed)
    classifier.eval().requires_grad_(False)
    pictures, scenes = world_sample(1000, purpose="classifier check", seed=seed)
    rates = (classifier.labels(classifier.features(pictures)) == scene_labels(scenes)).double().mean(0)
    if rates.min() < LOWEST_ACCURACY:
        listed = ", ".join(f"{name} {rate:.1%}" for name, rate in zip(LABELS, rates.tolist(), strict=True))
        raise RuntimeError(
            f"the classifier reads too few held-out pictures correctly ({listed}; every part needs "
            f"{LOWEST_ACCURACY:.0%}), so its metrics would be unreliable; give it more than {steps} steps or a seed "
            f"other than {seed}"
        )
    return classifier


def _fit(classifier: Classifier, pictures: Tensor, scenes: Sequence[Scene], *, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=_PEAK_LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LR, total_steps=steps + 1, pct_start=0.2)
    signal, labels = as_signal(pictures), scene_labels(scenes)
    progress = tqdm(range(steps), desc="classifier", unit="step")
    for step in progress:
        picked = torch.randint(len(signal), (_BATCH,), generator=generator)
        damaged, damage = _damage(signal[picked], generator)
        features = classifier.body(damaged)
        loss = F.mse_loss(classifier.damage(features), damage)
        for head, target in zip(classifier.heads.values(), labels[picked].T, strict=True):
            loss = loss + F.cross_entropy(head(features), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def _damage(signal: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Add noise and blur to two thirds of pictures [B, 3, S, S]; return them and the amounts in [0, 1], [B, 2]."""
    is_damaged = torch.rand(len(signal), 1, generator=generator) > 1 / 3
    amounts = torch.rand(len(signal), 2, generator=generator) * is_damaged
    noise = torch.randn(signal.shape, generator=generator)
    noise_std, blur_px = (amounts * torch.tensor([_MAX_NOISE, _MAX_BLUR_PX])).T
    return _blur(signal, blur_px) + rearrange(noise_std, "b -> b 1 1 1") * noise, amounts


def _blur(signal: Tensor, std_px: Tensor) -> Tensor:
    """Blur pictures [B, 3, S, S] with Gaussians of standard deviations [B] in pixels, along each axis."""
    position = torch.arange(signal.shape[-1])
    squared = (position[:, None] - position).square()
    weights = torch.softmax(-squared / (2 * rearrange(std_px.clamp(min=1e-3).square(), "b -> b 1 1 1")), dim=-1)
    return weights @ signal @ weights.mT
