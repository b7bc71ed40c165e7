"""Training examples: the latents, conditioning, times, noise and guidance scales of a micro-batch.

Every random number is a function of (seed, step, row). So it does not depend on how the rows are divided over
processes, and a checkpoint needs no generator state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..randomness import generator
from ..schedule import Schedule
from ..times import Times, sample_times, share_out
from .settings import Conditioning, Method, Optimization

C = TypeVar("C", bound=Conditioning)


class TimesAndGuidance(NamedTuple):
    """The times and guidance scales of one step, for the batch of all processes, on the CPU."""

    times: Times
    """Training times of the schedule, int64 [B] each."""
    guidance: Tensor
    """Guidance scales w, float32 [B]."""


@dataclass(frozen=True)
class Examples(Generic[C]):
    """The b rows of one micro-batch."""

    latents: Tensor
    """x0: normalized latents, float32 [b, C, ...]."""
    eps: Tensor
    """Unit noise of the same shape."""
    cond: C
    """The captions' conditioning, b rows."""
    uncond: C
    """The negative prompt's conditioning, b rows."""
    times: Times
    """Training times of the schedule, int64 [b] each."""
    target_rows: Tensor
    """Indices of the rows with s < t_next, int64; the target network is called only for these."""
    target_cond: C
    """The captions' conditioning of these rows; selected on the CPU, because to select by a GPU's indices may wait."""
    guidance: Tensor
    """Guidance scales w of the teacher, float32 [b]."""

    def to(self, device: torch.device) -> Examples[C]:
        """Return the examples on a device; from page-locked memory the copy does not block the CPU."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Examples[C]:
        """Return the examples in page-locked memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Examples[C]:
        return Examples(
            change(self.latents),
            change(self.eps),
            self.cond.map(change),
            self.uncond.map(change),
            Times(*map(change, self.times)),
            change(self.target_rows),
            self.target_cond.map(change),
            change(self.guidance),
        )


def draw_times_and_guidance(method: Method, training: Optimization, schedule: Schedule, step: int) -> TimesAndGuidance:
    """Draw the times and guidance scales of a step, counted from 0: a function of (seed, step)."""
    size, source = training.batch, generator(training.seed, "loss", step)
    times = sample_times(
        size,
        schedule=schedule,
        law=method.law,
        origin_steps=method.origin_steps,
        skip=method.skip,
        phases=method.phases[step * len(method.phases) // training.steps],
        generator=source,
    )
    (highest,) = schedule.sampler_times(1, method.origin_steps)
    times = share_out(
        times, step * size, diagonal=method.diagonal, to_clean=method.to_clean, highest=highest, skip=method.skip
    )
    low, high = method.guidance_min, method.guidance_max
    return TimesAndGuidance(times, low + (high - low) * torch.rand(size, generator=source))


def draw_examples(
    latents: Tensor,
    cond: C,
    uncond: C,
    rows: slice,
    *,
    method: Method,
    training: Optimization,
    schedule: Schedule,
    step: int,
) -> Examples[C]:
    """Draw the noise, times and guidance scales for some rows of a step's batch, on the CPU.

    latents: the rows' normalized latents, float32 [b, C, ...]. rows: which b rows of the batch they are.
    """
    drawn = draw_times_and_guidance(method, training, schedule, step)
    eps = [
        torch.randn(latents.shape[1:], generator=generator(training.seed, f"noise of row {row}", step))
        for row in range(training.batch)[rows]
    ]
    times = Times(*(time[rows] for time in drawn.times))
    chosen = times.target_rows
    return Examples(latents, torch.stack(eps), cond, uncond, times, chosen, cond[chosen], drawn.guidance[rows])
