"""What one part of a step trains on: its rows of the data, and everything random in them, read one part ahead.

Every random number is a function of (seed, step, row): a process draws those of its own rows alone, and there is no
generator state to save.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...tcd import Schedule
from ...tcd.times import Times, sample_times
from ..config.settings import Config
from ..data.dataset import Dataset
from ..models.conditioning import Conditioning
from ..randomness import generator


class Draws(NamedTuple):
    """The times and guidance scales of a step, for its whole batch, on the CPU."""

    times: Times
    guidance: Tensor
    """[B]."""


class Examples(NamedTuple):
    """The rows of one part of a step."""

    latents: Tensor
    """[b, C, ...] float32, normalized."""
    eps: Tensor
    """The same shape."""
    cond: Conditioning
    uncond: Conditioning
    times: Times
    """[b] int64 each."""
    moved: Tensor
    """int64: the rows whose target time is not t_next itself."""
    guidance: Tensor
    """[b]."""

    def to(self, device: torch.device) -> Examples:
        """The same on another device; a GPU copies from page-locked memory while the CPU goes on."""
        cond, uncond = (each.to(device, non_blocking=True) for each in (self.cond, self.uncond))
        latents, eps, moved, guidance = (
            each.to(device, non_blocking=True) for each in (self.latents, self.eps, self.moved, self.guidance)
        )
        times = Times(*(time.to(device, non_blocking=True) for time in self.times))
        return Examples(latents, eps, cond, uncond, times, moved, guidance)

    def pin(self) -> Examples:
        """The same in page-locked memory."""
        latents, eps, moved, guidance = (
            each.pin_memory() for each in (self.latents, self.eps, self.moved, self.guidance)
        )
        times = Times(*(time.pin_memory() for time in self.times))
        return Examples(latents, eps, self.cond.pin(), self.uncond.pin(), times, moved, guidance)


def draw(config: Config, schedule: Schedule, step: int) -> Draws:
    """Draw the times and guidance scales of a step: a function of (seed, step)."""
    method, size = config.method, config.training.batch
    source = generator(config.training.seed, "loss", step)
    times = sample_times(
        size,
        schedule=schedule,
        law=method.law,
        origin_steps=method.origin_steps,
        skip=method.skip,
        phases=method.phases[step * len(method.phases) // config.training.steps],
        generator=source,
    )
    low, high = method.guidance_min, method.guidance_max
    return Draws(times, low + (high - low) * torch.rand(size, generator=source))


def read(config: Config, dataset: Dataset, schedule: Schedule, step: int, rows: slice) -> Examples:
    """Read the rows of a step, and draw what is random in them, on the CPU."""
    training, draws = config.training, draw(config, schedule, step)
    batch = dataset.batch(step, training.batch, rows, seed=training.seed, caption_dropout=config.data.caption_dropout)
    shape = batch.latents.shape[1:]
    eps = [
        torch.randn(shape, generator=generator(training.seed, f"noise of row {row}", step))
        for row in range(training.batch)[rows]
    ]
    times = Times(*(time[rows] for time in draws.times))
    return Examples(batch.latents, torch.stack(eps), batch.cond, batch.uncond, times, times.moved, draws.guidance[rows])


@dataclass
class Reader:
    """Reads the parts of the steps in turn, each while the one before is trained on."""

    config: Config
    dataset: Dataset
    schedule: Schedule
    parts: Sequence[slice]
    """The rows of this process in a step, part by part."""
    pin: bool = False
    """Whether parts are read into page-locked memory, for a GPU."""

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader")
        self._ahead: tuple[tuple[int, int], Future[Examples]] | None = None

    def get(self, step: int, part: int) -> Examples:
        """The examples of a part of a step; raises what reading them raised."""
        place = (step, part)
        if self._ahead is not None and self._ahead[0] == place:
            examples = self._ahead[1].result()
        else:
            examples = self._read(*place)
        following = (step, part + 1) if part + 1 < len(self.parts) else (step + 1, 0)
        self._ahead = None
        if following[0] < self.config.training.steps:
            self._ahead = (following, self._thread.submit(self._read, *following))
        return examples

    def close(self) -> None:
        """Wait for what is being read, and end the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _read(self, step: int, part: int) -> Examples:
        examples = read(self.config, self.dataset, self.schedule, step, self.parts[part])
        return examples.pin() if self.pin else examples
