"""Read LoRA files from the host's loras folders: first the header, and the tensors only when they are applied."""

from functools import lru_cache
from pathlib import Path

import folder_paths
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...tcd import split_name
from ...tcd.target_time import PREFIX
from ..lora_file import FileStamp, LoraFile

LORAS = "loras"
"""The host's name of the folders of LoRAs."""
_SUFFIXES = (".safetensors", ".sft")


def lora_names() -> list[str]:
    """Return the LoRA files that the host lists."""
    return folder_paths.get_filename_list(LORAS)


def lora_stamp(name: str) -> FileStamp:
    """Return the path, modification time and size of a LoRA file; they change if the file is replaced.

    Raises ValueError for a name that is not in the host's list. Files outside the host's folders are never in the list.
    """
    if name not in lora_names():
        raise ValueError(f"there is no {name!r} in the loras folders: choose a file from the list, or copy it there")
    return _stamp(Path(folder_paths.get_full_path_or_raise(LORAS, name)))


def read_lora(name: str) -> LoraFile:
    """Read the header of a LoRA file, but no tensors.

    Raises ValueError if the file is not in the host's list, not a safetensors file, damaged, or not a LoRA. A pickle is
    never opened, because reading it could run code.
    """
    stamp, suffix = lora_stamp(name), Path(name).suffix
    if suffix.lower() not in _SUFFIXES:
        raise ValueError(
            f"{name} is not opened: a {suffix} file can run code when it is read. Convert it to .safetensors"
        )
    return _read_header(name, stamp)


def read_lora_at(path: Path) -> LoraFile:
    """Read the header of a safetensors file that the trainer has written, wherever it is, as `read_lora` does."""
    return _read_header(path.name, _stamp(path))


def _stamp(path: Path) -> FileStamp:
    stat = path.stat()
    return FileStamp(str(path), stat.st_mtime_ns, stat.st_size)


def _read_header(name: str, stamp: FileStamp) -> LoraFile:
    try:
        with safe_open(stamp.path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118, file is not a dict
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{name} cannot be read: it is damaged, incomplete or not a safetensors file. Download it again ({error})"
        ) from error
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return LoraFile(name, stamp, tensors, metadata)


def read_tensors(lora: LoraFile) -> dict[str, Tensor]:
    """Return the tensors of a LoRA file; the tensors of the two files used last are kept in memory.

    Raises ValueError if a tensor contains NaN or infinity.
    """
    if lora.stamp is None:
        return dict(lora.tensors)
    try:
        return _read_cached(lora.stamp)
    except ValueError as error:
        raise ValueError(f"{lora.name} was not applied: {error}") from None


@lru_cache(maxsize=2)  # cached at module level, because the host's nodes have no state
def _read_cached(stamp: FileStamp) -> dict[str, Tensor]:
    with safe_open(stamp.path, framework="pt") as file:
        # Cloned, because the tensors are memory-mapped: overwriting the file would change a model that uses them.
        names = file.keys()  # file is not a dict
        wanted = [name for name in names if split_name(name) or name.startswith(PREFIX)]
        tensors = {name: file.get_tensor(name).clone() for name in wanted}
    for key, tensor in tensors.items():
        if not tensor.float().isfinite().all():
            raise ValueError(f"{key} has numbers that are not finite: it was trained or saved with an error")
    return tensors
