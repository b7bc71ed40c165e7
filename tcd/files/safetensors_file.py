"""Read .safetensors files: names, shapes and metadata at opening, tensors on request."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError


class SafetensorsFile:
    """An open .safetensors file, with `path`, `shapes` and `dtypes` by tensor name, and `metadata`."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises UserError if it does not exist or is not a complete safetensors file.
        """
        if not path.exists():
            raise UserError(f"there is no file {path}")
        if path.is_dir():
            raise UserError(f"{path} is a folder: name the .safetensors file in it")
        if not path.is_file():
            raise UserError(f"{path} is not a file, but a device or a pipe: name a .safetensors file")
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} is not a complete safetensors file ({error}): it may be truncated, or of another format, "
                "such as .ckpt or .gguf; download it again or convert it"
            ) from error
        self.path = path
        names = self._file.keys()  # safe_open is no mapping and cannot be iterated
        self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in names}
        self.dtypes: dict[str, str] = {name: self._file.get_slice(name).get_dtype() for name in names}
        """As safetensors spells them, such as F16, BF16, F8_E4M3 and I8."""
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, memory-mapped: its values are read from the disk when they are used."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


def attached(names: Iterable[str], used: Collection[str]) -> list[str]:
    """Return the names of tensors that are not used, but belong to a weight or bias that is, such as its scale.

    Such a tensor is in the module of the weight, or in a module below it or below the weight. Without it, the weight
    means something else.
    """
    owners = {name.rpartition(".")[0] for name in used if name.endswith(("weight", "bias"))}
    return [name for name in names if name not in used and not owners.isdisjoint(_parents(name))]


def _parents(name: str) -> Iterable[str]:
    """Yield a, a.b and so on of a name a.b.c."""
    return accumulate(name.split(".")[:-1], "{}.{}".format)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return every tensor of a .safetensors file by name, and the metadata.

    Raises UserError if the file does not exist or is not a complete safetensors file.
    """
    file = SafetensorsFile(path)
    return {name: file.tensor(name) for name in file.shapes}, file.metadata
