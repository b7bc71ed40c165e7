"""A .safetensors file: names, shapes and metadata when it is opened, tensors when they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import UserError


class SafetensorsFile:
    """An open file."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises UserError if there is none, or if it is not a complete safetensors file.
        """
        if not path.exists():
            raise UserError(f"there is no file {path}")
        if path.is_dir():
            raise UserError(f"{path} is a folder: name the .safetensors file in it")
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} is not a whole safetensors file ({error}): it may be truncated, or of another format, "
                "such as .ckpt; download it again or convert it"
            ) from error
        self.path = path
        names = self._file.keys()  # not a mapping
        self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in names}
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def tensor(self, name: str) -> Tensor:
        """A tensor, mapped from the file: its numbers are read when they are used."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read every tensor of a .safetensors file, and its metadata.

    Raises UserError as SafetensorsFile does.
    """
    file = SafetensorsFile(path)
    return {name: file.tensor(name) for name in file.shapes}, file.metadata
