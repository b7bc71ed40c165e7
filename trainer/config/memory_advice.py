"""The advice in the message when memory runs out, for each phase of a run."""

from __future__ import annotations

import torch

from .settings import Config


def caching_advice(config: Config, device: torch.device, dtype: torch.dtype) -> str:
    """Return the advice for encoding pictures and captions on `device`, with the network in `dtype`."""
    instead = (
        ""
        if device.type == "cpu"
        else (
            "Encode on the CPU, once: tcd-train cache, with the same configuration and training.device=cpu "
            f"base.dtype={str(dtype).removeprefix('torch.')}; the run then finds everything there. "
        )
    )
    return (
        f"while pictures of {config.data.resolution} px were encoded into the cache, which keeps the finished ones. "
        f"{instead}Or close other programs that use the memory; or use a smaller data.resolution, with a different "
        "output.folder"
    )


def loading_advice(dtype: torch.dtype) -> str:
    """Return the advice for loading the base's network in `dtype`."""
    half = "" if dtype.itemsize == 2 else " Or halve it with base.dtype=bfloat16 and a different output.folder."
    return (
        "while the base's network was loaded: close other programs that use the memory, or shard it over several GPUs "
        f"(trainer/launch/fsdp.yaml).{half}"
    )


def preview_advice(config: Config) -> str:
    """Return the advice for drawing previews."""
    side = config.data.resolution
    return (
        f"while a preview of {config.preview.width or side} x {config.preview.height or side} px was drawn. Use a "
        "smaller preview.width and preview.height, or preview.prompts=[] for no previews. They do not affect training, "
        "so the same command with the new values resumes from the last checkpoint"
    )


def training_advice(config: Config, largest: int, *, can_recompute: bool) -> str:
    """Return the advice for training with at most `largest` pictures in one forward pass.

    can_recompute: whether training.gradient_checkpointing would change something.
    """
    recompute = "training.gradient_checkpointing=true, or " if can_recompute else ""
    return (
        f"with {largest} pictures of {config.data.resolution} px at a time. Use "
        f"{recompute}a larger training.accumulate (now {config.training.accumulate}): it is slower and changes nothing "
        "else, so the same command with it resumes from the last checkpoint. Or use a smaller training.batch, "
        "data.resolution or adapter.rank, with a different output.folder"
    )
