"""Data-parallel training: the processes that `accelerate launch` has started, or a single one.

Each process computes the gradient of its own rows of the batch. The network is not wrapped in DistributedDataParallel,
which expects one forward pass for each backward pass: here there are up to five, with the adapter in several states.
Instead, the complete gradient of the adapter is summed over the processes, and every process makes the same optimizer
step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ..errors import RunError, UserError
from .peers import Peers

T = TypeVar("T")
_BUCKET_BYTES = 32 * 2**20  # gradients per all-reduce; this much memory is needed for a copy of them
# A collective begins when all processes have come to it (`Peers.meet`), so it takes no longer than the exchange.
_TIMEOUT = timedelta(minutes=10)
# Set by `accelerate launch`, torchrun and MPI in each of the processes that they start.
_LAUNCHER_VARIABLES = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Processes:
    """The rank of this process and the number of processes, and the communication between them."""

    rank: int = 0
    count: int = 1
    peers: Peers | None = None
    """Waits for the other processes before each collective; None for a single process."""

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, the only one that writes results, shows progress and logs."""
        return self.rank == 0

    def micro_batches(self, batch: int, accumulate: int) -> list[slice]:
        """Return this process's rows of a batch as `accumulate` micro-batches of equal size.

        Raises UserError if `batch` is not a multiple of accumulate times the number of processes.
        """
        size, rest = divmod(batch, self.count * accumulate)
        if rest:
            raise UserError(
                f"training.batch is {batch}: use a multiple of training.accumulate times the number of processes, "
                f"{accumulate} x {self.count}"
            )
        first = self.rank * accumulate
        return [slice(number * size, (number + 1) * size) for number in range(first, first + accumulate)]

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over the processes.

        Tensors are exchanged in buckets: one call for each tensor would be slow, one for all would need a full copy.
        """
        if self.count == 1:
            return
        self.barrier()
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            distributed.all_reduce(flat)
            pieces = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [piece.view_as(each) for piece, each in zip(pieces, bucket, strict=True)])

    def on_main_process(self, function: Callable[[], T]) -> T:
        """Call `function` in the main process only, and return its result in every process.

        A UserError, RunError or OSError that it raises is raised in every process.
        """
        if self.count == 1:
            return function()
        result: list[Any] = [None]
        if self.is_main:
            result = [_result_or_error(function)]
        self.barrier()
        distributed.broadcast_object_list(result)
        if isinstance(result[0], Exception):
            raise result[0]
        returned: T = result[0]
        return returned

    def on_every_process(self, function: Callable[[], T]) -> T:
        """Call `function` in every process, wait for all of them, and return this process's result.

        A UserError, RunError or OSError that it raises in one process is raised in every process.
        """
        if self.count == 1:
            return function()
        result = _result_or_error(function)
        self.barrier()
        errors: list[Exception | None] = [None] * self.count
        distributed.all_gather_object(errors, result if isinstance(result, Exception) else None)
        for error in errors:
            if error is not None:
                raise error
        assert not isinstance(result, Exception)
        return result

    def barrier(self) -> None:
        """Wait until every process has called this; raises RunError if one of them has ended."""
        if self.peers is not None:
            self.peers.meet()

    def leave(self) -> None:
        """Wait for the last time until every process has called this."""
        if self.peers is not None:
            self.peers.leave()


def _result_or_error(function: Callable[[], T]) -> T | Exception:
    """Return the function's result, or the UserError, RunError or OSError that it raises."""
    try:
        return function()
    except (UserError, RunError, OSError) as error:
        return error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in order, in groups of one dtype and at most _BUCKET_BYTES, or one larger tensor."""
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
"""A single process."""


def join_processes(device: torch.device) -> tuple[Processes, torch.device]:
    """Connect to the processes that were launched together with this one; also return this process's device.

    Raises UserError if this process was launched as one of several, and accelerate is not installed.
    """
    launched = [name for name in _LAUNCHER_VARIABLES if name in os.environ]
    if not launched:
        return ALONE, device
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise UserError(
            f"{launched[0]} is set, as for one of several processes, which need accelerate ({error}): "
            f"pip install accelerate, or unset {launched[0]} for a single process"
        ) from error
    state = PartialState(cpu=device.type == "cpu", timeout=_TIMEOUT)
    if state.num_processes == 1:
        return ALONE, device
    peers = Peers(state.process_index, state.num_processes)
    return Processes(state.process_index, state.num_processes, peers), state.device
