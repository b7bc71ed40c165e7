"""What to do when the memory is full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.config import Config
from trainer.errors import RunError


class MemoryFullError(RunError):
    """A step did not fit into memory; the message says what to lower."""


@contextmanager
def memory_advice(config: Config, largest: int) -> Iterator[None]:
    """Within the block, training in parts of `largest` pictures, a full memory is a MemoryFullError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_full(error):
            raise
        raise MemoryFullError(
            f"out of memory with {largest} pictures of {config.data.resolution} px at a time. Use "
            "training.gradient_checkpointing=true, or a larger training.accumulate "
            f"(now {config.training.accumulate}): both take time and change nothing else, so the same command with "
            "them goes on from the last checkpoint. Or, in another output.folder, a smaller training.batch, "
            "data.resolution or adapter.rank"
        ) from error


def _is_full(error: Exception) -> bool:
    # A GPU's is a RuntimeError of its own type, a CPU's a RuntimeError like any other.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
