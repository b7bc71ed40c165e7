"""The three times of a training example: t, the time after the teacher's step, and the target time s.

All three are training times of a schedule, which are whole numbers (tcd/schedule.py), and s <= t_next < t. They are
drawn on the CPU.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .schedule import Schedule, TimePoint

Law = Literal["uniform", "zero", "segment", "phase", "target"]

# The law "target", from arXiv 2409.01347.
TARGET_STEPS = range(4, 9)  # targets are times that samplers with these numbers of steps visit
TARGET_REACH = 260  # s is drawn from targets at most this far below the highest one, in training times
TARGET_FALL = 0.3  # the drawn target is multiplied by 1 - this u, u in [0, 1]: a sampler's 1 - gamma


class Times(NamedTuple):
    """Training times, int64 [B], with 0 <= s <= t_next < t."""

    t: Tensor
    t_next: Tensor
    s: Tensor

    @property
    def target_rows(self) -> Tensor:
        """The rows with s < t_next, int64 [b], for tcd_loss. If the times are on a GPU, this waits for the GPU."""
        return (self.s < self.t_next).nonzero().flatten()


class Points(NamedTuple):
    """The noise levels and network times at the three times of B examples."""

    t: TimePoint
    t_next: TimePoint
    s: TimePoint

    def rows(self, index: Tensor | slice) -> Points:
        """Select rows of the batch. index: int64 [b] on the device of the tensors, or a slice."""
        return Points(*(point.rows(index) for point in self))


def sample_times(
    batch: int,
    *,
    schedule: Schedule,
    law: Law,
    origin_steps: int,
    skip: int,
    generator: torch.Generator,
    phases: int = 1,
) -> Times:
    """Draw t > 0 on the distillation grid, step to t_next = max(t - skip, 0), and draw s by `law`.

    skip: length of the teacher's step, in training times of the schedule. generator: a CPU generator.

    Each law draws s uniformly from these times:
    uniform: points of the grid up to t_next (TCD, arXiv 2402.19159).
    zero: only 0 (LCM, arXiv 2310.04378).
    segment: all training times from the start of t's segment up to t_next. The clock is divided into `phases` equal
    segments (TSCD of Hyper-SD, arXiv 2404.13686).
    phase: only the highest time below t that a sampler of `phases` steps visits, or 0 (PCM, arXiv 2405.18407).
    target: the candidates are 0 and the times that samplers of 4 to 8 steps visit. s is the highest candidate up to
    t_next, or one at most 260 below it. The drawn time is multiplied by 1 - 0.3 u, with u uniform in [0, 1] (TDD,
    arXiv 2409.01347).

    If a law gives an s above t_next, s is t_next. Raises ValueError if schedule.grid or schedule.sampler_times does.
    """
    # t cannot be 0, although 0 is a point of the grid: there is no earlier time to jump to.
    grid = schedule.grid(origin_steps)
    t = grid[torch.randint(1, len(grid), (batch,), generator=generator)]
    t_next = _after_step(t, skip)
    if law == "zero":
        s = torch.zeros_like(t)
    elif law == "uniform":
        s = _uniform(grid, torch.zeros_like(t), t_next, generator)
    elif law == "segment":
        s = _segment(t, t_next, schedule.num_times, phases, generator)
    elif law == "phase":
        s = _phase(t, schedule.sampler_times(phases, origin_steps))
    else:
        s = _target(t_next, schedule, origin_steps, generator)
    return Times(t, t_next, torch.minimum(s, t_next))


def share_out(times: Times, first: int, *, diagonal: float, to_clean: float, highest: int, skip: int) -> Times:
    """Replace the drawn s by t_next in a share `diagonal` of the examples, and by 0 in a share `to_clean`.

    first: the number of the batch's first example, counted over the whole run. The number of an example decides its
    group. So each group has its share of every step, give or take one or two examples, and lies evenly in the batch.
    highest: the highest training time, at which sampling starts. skip: as for `sample_times`. The shares add up to at
    most 1.

    Where s = t_next, the target is the teacher's own step. These examples keep short jumps right; flow maps call s = t
    the diagonal (arXiv 2505.13447, 2506.14603). Every second example with s = 0 gets t = `highest`: the only jump of a
    sampler with one step. Of the examples that `sample_times` draws, it is one of some thousands.
    """
    number = torch.arange(first, first + len(times.t), dtype=torch.float64)
    on_diagonal = _every(number, diagonal)
    other = number - (number * diagonal).floor()  # counts the examples that are not on the diagonal
    share = to_clean / (1 - diagonal) if to_clean else 0.0  # of these
    is_clean = ~on_diagonal & _every(other, share)
    is_one_step = is_clean & _every((other * share).floor(), 0.5)
    t = torch.where(is_one_step, highest, times.t)
    t_next = _after_step(t, skip)
    return Times(t, t_next, torch.where(is_clean, 0, torch.where(on_diagonal, t_next, times.s)))


def _after_step(t: Tensor, skip: int) -> Tensor:
    """Return where the teacher's step from t ends, [B]."""
    return (t - skip).clamp(min=0)


def _every(number: Tensor, share: float) -> Tensor:
    """Select a share of the numbers 0, 1, 2, ... as evenly as possible: floor(n * share) of the first n."""
    return ((number + 1) * share).floor() > (number * share).floor()


def _uniform(points: Tensor, low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one of the ascending points in [low, high] for each row, [B]; every such interval must contain a point."""
    first = torch.searchsorted(points, low)
    count = torch.searchsorted(points, high, right=True) - first
    return points[first + (torch.rand(len(low), generator=generator) * count).long()]


def _segment(t: Tensor, t_next: Tensor, num_times: int, segments: int, generator: torch.Generator) -> Tensor:
    edges = torch.arange(segments) * num_times // segments
    start = edges[torch.searchsorted(edges, t, right=True) - 1]
    start = torch.minimum(start, t_next)  # the teacher's step may end below the segment
    return _uniform(torch.arange(num_times), start, t_next, generator)


def _phase(t: Tensor, visited: list[int]) -> Tensor:
    edges = torch.tensor([0, *reversed(visited)])
    return edges[torch.searchsorted(edges, t) - 1]


def _target(t_next: Tensor, schedule: Schedule, origin_steps: int, generator: torch.Generator) -> Tensor:
    visited = {time for steps in TARGET_STEPS for time in schedule.sampler_times(steps, origin_steps)}
    points = torch.tensor(sorted({0, *visited} - {schedule.num_times - 1}))
    highest = points[torch.searchsorted(points, t_next, right=True) - 1]
    chosen = _uniform(points, (highest - TARGET_REACH).clamp(min=0), highest, generator)
    return ((1 - TARGET_FALL * torch.rand(len(t_next), generator=generator)) * chosen).long()
