"""The processes that train together: one, or as many as `accelerate launch` has started.

Flows in: what each has computed on its rows of a step.  Flows out: the sum over all, the same in each.

The UNet is not wrapped in DistributedDataParallel: that counts on one forward and one backward through the module a
step, and ours runs up to five, with its adapter on, off or replaced.  All that the processes must agree on is the
gradient of the adapter, so that is added up, in one go, when it is complete; the same adapter goes into the same
optimizer in each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from torch import Tensor

from ..errors import RunError, UserError

T = TypeVar("T")
_PATIENCE = timedelta(days=1)  # as one may have much more to encode than the others, or a preview to draw


@dataclass(frozen=True)
class Processes:
    """The place of this process among all."""

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the one that writes files, draws bars and logs."""
        return self.rank == 0

    def parts(self, size: int, accumulate: int) -> list[slice]:
        """The rows of a step of `size` pictures that are this process's, in `accumulate` parts; all are of one length.

        Raises UserError when the step cannot be divided so.
        """
        each, rest = divmod(size, self.count * accumulate)
        if rest:
            raise UserError(
                f"training.batch is {size}: use a multiple of training.accumulate times the number of processes, "
                f"{accumulate} x {self.count}"
            )
        first = self.rank * accumulate
        return [slice(part * each, (part + 1) * each) for part in range(first, first + accumulate)]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over the processes."""
        if self.count == 1:
            return
        whole = reduce(torch.cat([tensor.flatten() for tensor in tensors]), reduction="sum")
        pieces = whole.split([tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))

    def once(self, function: Callable[[], T]) -> T:
        """What `function` returns in the main process, which alone calls it; the others wait, and return the same.

        What it raises for people to read is raised in all of them.
        """
        if self.count == 1:
            return function()
        told: list[Any] = [None]
        if self.main:
            try:
                told = [function()]
            except (UserError, RunError, OSError) as error:
                told = [error]
        broadcast_object_list(told)
        if isinstance(told[0], Exception):
            raise told[0]
        found: T = told[0]
        return found

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            PartialState().wait_for_everyone()


ALONE = Processes()


def join(device: torch.device) -> tuple[Processes, torch.device]:
    """Meet the processes that were launched together with this one, if any; return this one's device, too."""
    state = PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)
    if state.num_processes == 1:
        return ALONE, device
    return Processes(state.process_index, state.num_processes), state.device
