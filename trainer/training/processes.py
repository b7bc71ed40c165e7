"""The processes that train together: one, or as many as `accelerate launch` has started.

Flows in: what each has computed on its rows of a step.  Flows out: the sum over all, the same in each.

The network is not wrapped in DistributedDataParallel: that expects one forward and one backward pass a step, and ours
has up to five, with the adapter in several states.  All that the processes must agree on is the adapter's gradient, so
it is summed when it is complete; then each process makes the same optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, distributed

from ..errors import RunError, UserError

T = TypeVar("T")
_BUCKET_BYTES = 32 * 2**20  # of gradients that are exchanged at once, and copied for it
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
        """Replace each tensor, in place, by its sum over the processes; bucket by bucket, to need little memory."""
        if self.count == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            distributed.all_reduce(flat)
            pieces = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [piece.view_as(each) for piece, each in zip(pieces, bucket, strict=True)])

    def once(self, function: Callable[[], T]) -> T:
        """What `function` returns in the main process, which alone calls it; the others wait, and return the same.

        What it raises for people to read is raised in all of them.
        """
        if self.count == 1:
            return function()
        result: list[Any] = [None]
        if self.main:
            try:
                result = [function()]
            except (UserError, RunError, OSError) as error:
                result = [error]
        broadcast_object_list(result)
        if isinstance(result[0], Exception):
            raise result[0]
        found: T = result[0]
        return found

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            PartialState().wait_for_everyone()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, in groups of one dtype and about _BUCKET_BYTES."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > _BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


ALONE = Processes()


def join(device: torch.device) -> tuple[Processes, torch.device]:
    """Meet the processes that were launched together with this one, if any; return this one's device, too."""
    state = PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)
    if state.num_processes == 1:
        return ALONE, device
    return Processes(state.process_index, state.num_processes), state.device
