"""What identifies a model: the host's name for its architecture, the shift of its noise schedule, and its file."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from ...tcd.fingerprint import combined, hash_samples
from ...tcd.lora_metadata import FAMILY_KEY, HOST_FAMILIES, SHIFT_KEY, TARGET_TIME_MODULE_KEY

TRAINER_FAMILIES = {host: family for family, host in HOST_FAMILIES.items()}
"""The trainer's names of families that its other engine knows too, by the host's."""


def model_name(model: Any) -> str:
    """Return the host's name for the architecture of a model, such as SD15 or SDXL."""
    return type(model.model.model_config).__name__


def model_shift(model_sampling: Any) -> float | None:
    """Return the shift of a model's noise schedule, or None if it has none."""
    shift = getattr(model_sampling, "shift", None)
    return None if shift is None else float(shift)


def model_path(model: Any) -> Path | None:
    """Return the path from which the host has loaded a model, or None if the host does not say."""
    loaded = getattr(model, "cached_patcher_init", None)  # (the host's function, its arguments, ...)
    path = loaded[1][0] if loaded and loaded[1] else None
    return Path(path) if isinstance(path, str) else None


def model_file(model: Any) -> Path | None:
    """Return the file at `model_path`, or None if there is none, or it is gone."""
    path = model_path(model)
    return path if path is not None and path.is_file() else None


def file_fingerprint(path: Path) -> str:
    """Return the fingerprint of a model's file, for which 16 MiB of it are read, but once for each version of it."""
    stat = path.stat()
    return _fingerprint(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=8)
def _fingerprint(path: Path, modified_ns: int, size: int) -> str:
    with path.open("rb") as file:
        return combined([hash_samples(file, size)])


def model_metadata(name: str, shift: float | None, time_layer: str) -> dict[str, str]:
    """Return the metadata of a LoRA file about the model that it was trained on, from `model_name` and `model_shift`.

    time_layer: the path of the layer whose output is the embedding of t.
    """
    return {
        "modelspec.architecture": f"{TRAINER_FAMILIES.get(name, name)}/lora",
        "modelspec.implementation": "comfyui",
        FAMILY_KEY: name,
        TARGET_TIME_MODULE_KEY: time_layer,
        **({} if shift is None else {SHIFT_KEY: f"{shift:g}"}),
    }
