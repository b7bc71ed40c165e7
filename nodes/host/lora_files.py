"""LoRA files as the host lists them: their headers first, and their tensors only when they are wanted."""

from functools import lru_cache
from pathlib import Path

import folder_paths
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...tcd import split_name
from ...tcd.target_time import PREFIX
from ..lora_file import LoraFile, Stamp

_LORAS = "loras"
_SUFFIXES = (".safetensors", ".sft")


def lora_names() -> list[str]:
    """Return the LoRA files that the host lists."""
    return folder_paths.get_filename_list(_LORAS)


def lora_stamp(name: str) -> Stamp:
    """Return (path, modification time, size) of a LoRA file: what changes when the file does.

    Raises ValueError for a name that the host does not list, so also for a path that leads out of its folders.
    """
    if name not in lora_names():
        raise ValueError(f"there is no {name!r} in the loras folders: choose a file of the list, or copy it there")
    path = Path(folder_paths.get_full_path_or_raise(_LORAS, name))
    stat = path.stat()
    return Stamp(str(path), stat.st_mtime_ns, stat.st_size)


def read_lora(name: str) -> LoraFile:
    """Read the header of a LoRA file, and no tensor.

    Raises ValueError when there is none of that name, when it is a pickle, which could run code and is not opened, when
    it is not readable, and when it is not a LoRA.
    """
    stamp = lora_stamp(name)
    suffix = Path(name).suffix
    if suffix.lower() not in _SUFFIXES:
        raise ValueError(
            f"{name} is not opened: a {suffix} file can run code when it is read. Convert it to .safetensors"
        )
    try:
        with safe_open(stamp.path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118, it is no dict
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{name} cannot be read: it is damaged, incomplete or not a safetensors file. Download it again ({error})"
        ) from error
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return LoraFile(name, stamp, tensors, metadata)


def read_tensors(lora: LoraFile) -> dict[str, Tensor]:
    """Read the tensors of a LoRA file, or have them from memory if they were just read.

    Raises ValueError when one of them has a NaN or an infinite number.
    """
    try:
        return _read(lora.stamp)
    except ValueError as error:
        raise ValueError(f"{lora.name} was not applied: {error}") from None


@lru_cache(maxsize=2)  # a node class of the host keeps no state of its own
def _read(stamp: Stamp) -> dict[str, Tensor]:
    with safe_open(stamp.path, framework="pt") as file:
        # Copies, so that a file written over in place does not change a model that has its LoRA.
        names = file.keys()  # it is no dict
        wanted = [name for name in names if split_name(name) or name.startswith(PREFIX)]
        tensors = {name: file.get_tensor(name).clone() for name in wanted}
    for key, tensor in tensors.items():
        if not tensor.float().isfinite().all():
            raise ValueError(f"{key} has numbers that are not finite: it was trained or saved with an error")
    return tensors
