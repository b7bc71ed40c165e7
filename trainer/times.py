"""The three times of a training example: t, the time after the teacher's step, and the target time s.

All are integer training timesteps.  Flows in: how many, and a generator.  Flows out: s <= t_next < t.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tcd import timestep_grid

Law = Literal["uniform", "zero"]


class Times(NamedTuple):
    """Integer training timesteps, int64 [B], with s <= t_next < t."""

    t: Tensor
    t_next: Tensor
    s: Tensor


def sample_times(batch: int, *, law: Law, origin_steps: int, skip: int, generator: torch.Generator) -> Times:
    """Draw t on the distillation grid, step to t_next = max(t - skip, 0), and draw s by `law`.

    `uniform`: s is uniform over the points of the grid, and 0, that are at most t_next (TCD, arXiv 2402.19159).
    `zero`: s = 0 (LCM, arXiv 2310.04378).
    """
    grid = torch.tensor([0, *reversed(timestep_grid(origin_steps, origin_steps=origin_steps))])
    t = grid[torch.randint(1, len(grid), (batch,), generator=generator)]
    t_next = (t - skip).clamp(min=0)
    if law == "zero":
        return Times(t, t_next, torch.zeros_like(t))
    reachable = torch.searchsorted(grid, t_next, right=True)  # number of grid points <= t_next, at least one
    chosen = (torch.rand(batch, generator=generator) * reachable).long()
    return Times(t, t_next, grid[chosen])
