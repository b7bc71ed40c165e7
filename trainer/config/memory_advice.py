"""What to do when the memory is full, in each phase of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import RunError
from .settings import Config


class MemoryFullError(RunError):
    """Something did not fit into memory; the message says what to lower."""


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Within the block a full memory is a MemoryFullError: "out of memory", and the advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_full(error):
            raise
        raise MemoryFullError(f"out of memory {advice}") from error


def when_caching(config: Config, device: torch.device, dtype: torch.dtype) -> str:
    """The advice while pictures and captions are encoded on `device`, with text encoders in `dtype`."""
    instead = (
        ""
        if device.type == "cpu"
        else (
            "Encode on the CPU, once: tcd-train cache, with the same configuration and training.device=cpu "
            f"base.dtype={str(dtype).removeprefix('torch.')}; the run then finds everything there. "
        )
    )
    return (
        f"while pictures of {config.data.resolution} px were encoded into the cache, where what is done already is "
        f"kept. {instead}Or close what else uses the memory; or, in another output.folder, use a smaller "
        "data.resolution"
    )


def when_loading(dtype: torch.dtype) -> str:
    """The advice while the base's UNet is loaded in `dtype`."""
    half = "" if dtype.itemsize == 2 else " Use base.dtype=bfloat16, in another output.folder, which takes half of it."
    return (
        "while the base's UNet was loaded: close what else uses the memory, or spread it over several GPUs "
        f"(trainer/launch/fsdp.yaml).{half}"
    )


def when_previewing(config: Config) -> str:
    """The advice while previews are drawn."""
    side = config.data.resolution
    return (
        f"while a preview of {config.preview.width or side} x {config.preview.height or side} px was drawn. Use a "
        "smaller preview.width and preview.height, or preview.prompts=[] for none: what is trained does not depend on "
        "them, so the same command with them goes on from the last checkpoint"
    )


def when_training(config: Config, largest: int) -> str:
    """The advice while training in parts of `largest` pictures."""
    return (
        f"with {largest} pictures of {config.data.resolution} px at a time. Use "
        "training.gradient_checkpointing=true, or a larger training.accumulate "
        f"(now {config.training.accumulate}): both take time and change nothing else, so the same command with "
        "them goes on from the last checkpoint. Or, in another output.folder, a smaller training.batch, "
        "data.resolution or adapter.rank"
    )


def _is_full(error: Exception) -> bool:
    # A GPU's is a RuntimeError of its own type, a CPU's a RuntimeError like any other.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
