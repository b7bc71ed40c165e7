"""The error when memory runs out, with advice for the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import RunError


class MemoryFullError(RunError):
    """Memory ran out; the message says which settings need less."""


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Convert an out-of-memory error within the block to a MemoryFullError: "out of memory", followed by `advice`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_full(error):
            raise
        raise MemoryFullError(f"out of memory {advice}") from error


def _is_full(error: Exception) -> bool:
    # CUDA raises its own type; on a CPU torch raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
