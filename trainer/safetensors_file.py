"""Read .safetensors files: names, shapes and metadata at opening, tensors on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import UserError


class SafetensorsFile:
    """An open .safetensors file, with `path`, `shapes` by tensor name, and `metadata`."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises UserError if it does not exist or is not a complete safetensors file.
        """
        if not path.exists():
            raise UserError(f"there is no file {path}")
        if path.is_dir():
            raise UserError(f"{path} is a folder: name the .safetensors file in it")
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} is not a complete safetensors file ({error}): it may be truncated, or of another format, "
                "such as .ckpt; download it again or convert it"
            ) from error
        self.path = path
        names = self._file.keys()  # safe_open is no mapping and cannot be iterated
        self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in names}
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, memory-mapped: its values are read from the disk when they are used."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return every tensor of a .safetensors file by name, and the metadata.

    Raises UserError if the file does not exist or is not a complete safetensors file.
    """
    file = SafetensorsFile(path)
    return {name: file.tensor(name) for name in file.shapes}, file.metadata
