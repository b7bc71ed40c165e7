"""Training examples: the latents, captions, times, noise and guidance scales of a micro-batch.

Every random number is a function of (seed, step, row). So it does not depend on how the rows are divided over
processes, and a checkpoint needs no generator state. On a GPU, a thread reads the next micro-batch in advance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...tcd import Schedule
from ...tcd.times import Times, sample_times, share_out
from ..config.settings import Config
from ..data.dataset import Dataset
from ..models.conditioning import Conditioning
from ..randomness import generator


class TimesAndGuidance(NamedTuple):
    """The times and guidance scales of one step, for the batch of all processes, on the CPU."""

    times: Times
    """Training times of the schedule, int64 [B] each."""
    guidance: Tensor
    """Guidance scales w, float32 [B]."""


class Examples(NamedTuple):
    """The b rows of one micro-batch."""

    latents: Tensor
    """x0: normalized latents, float32 [b, C, ...]."""
    eps: Tensor
    """Unit noise of the same shape."""
    cond: Conditioning
    """The captions' conditioning, b rows."""
    uncond: Conditioning
    """The empty caption's conditioning, b rows."""
    times: Times
    """Training times of the schedule, int64 [b] each."""
    target_rows: Tensor
    """Indices of the rows with s < t_next, int64; the target network is called only for these."""
    guidance: Tensor
    """Guidance scales w of the teacher, float32 [b]."""

    def to(self, device: torch.device) -> Examples:
        """Return the examples on a device; from page-locked memory the copy does not block the CPU."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Examples:
        """Return the examples in page-locked memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Examples:
        return Examples(
            change(self.latents),
            change(self.eps),
            self.cond.map(change),
            self.uncond.map(change),
            Times(*map(change, self.times)),
            change(self.target_rows),
            change(self.guidance),
        )


def draw_times_and_guidance(config: Config, schedule: Schedule, step: int) -> TimesAndGuidance:
    """Draw the times and guidance scales of a step, counted from 0: a function of (seed, step)."""
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
    (highest,) = schedule.sampler_times(1, method.origin_steps)
    times = share_out(
        times, step * size, diagonal=method.diagonal, to_clean=method.to_clean, highest=highest, skip=method.skip
    )
    low, high = method.guidance_min, method.guidance_max
    return TimesAndGuidance(times, low + (high - low) * torch.rand(size, generator=source))


def read_examples(config: Config, dataset: Dataset, schedule: Schedule, step: int, rows: slice) -> Examples:
    """Read some rows of a step's batch and draw their noise, times and guidance scales, on the CPU."""
    training, drawn = config.training, draw_times_and_guidance(config, schedule, step)
    batch = dataset.batch(step, training.batch, rows, seed=training.seed, caption_dropout=config.data.caption_dropout)
    shape = batch.latents.shape[1:]
    eps = [
        torch.randn(shape, generator=generator(training.seed, f"noise of row {row}", step))
        for row in range(training.batch)[rows]
    ]
    times = Times(*(time[rows] for time in drawn.times))
    return Examples(
        batch.latents, torch.stack(eps), batch.cond, batch.uncond, times, times.target_rows, drawn.guidance[rows]
    )


@dataclass
class Prefetcher:
    """Reads micro-batches; with `ahead`, a thread reads the next one while the current one is trained on."""

    config: Config
    dataset: Dataset
    schedule: Schedule
    micro_batches: Sequence[slice]
    """This process's rows of a step's batch, for each micro-batch."""
    pin: bool = False
    """Whether to read into page-locked memory, for asynchronous copies to a GPU."""
    ahead: bool = True
    """Whether to read the next micro-batch in advance; on a CPU the thread would slow the training down."""

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._next: tuple[tuple[int, int], Future[Examples]] | None = None
        """((step, index), examples) of the micro-batch that is being read."""

    def get(self, step: int, index: int) -> Examples:
        """Return micro-batch `index` of a step and, with `ahead`, start reading the next.

        Raises the errors of the thread that read it.
        """
        if self._next is not None and self._next[0] == (step, index):
            examples = self._next[1].result()
        else:
            examples = self._read(step, index)
        following = (step, index + 1) if index + 1 < len(self.micro_batches) else (step + 1, 0)
        self._next = None
        if self.ahead and following[0] < self.config.training.steps:
            self._next = (following, self._thread.submit(self._read, *following))
        return examples

    def close(self) -> None:
        """Wait until the read in progress is done, and end the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _read(self, step: int, index: int) -> Examples:
        examples = read_examples(self.config, self.dataset, self.schedule, step, self.micro_batches[index])
        return examples.pin() if self.pin else examples
