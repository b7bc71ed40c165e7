"""Safetensors files with two checksums in their metadata: of what the header says, and of the tensors' content.

A file that was cut, or whose bits changed, is then known as damaged when it is opened, and not by what follows from it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_HEADER, _CONTENT = "header_crc32", "crc32"


def save_checked(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous tensors on the CPU, the metadata and the checksums to a file."""
    given = dict(metadata or {})
    checksums = {_HEADER: _header_checksum(tensors, given), _CONTENT: _content_checksum(tensors)}
    save_file(dict(tensors), path, metadata=given | checksums)


def open_checked(path: Path, *, content: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file, memory-mapped, and the metadata.

    content: whether to check the content too, for which all of the file is read; names, dtypes, shapes, metadata and
    the file's length are always checked. Raises OSError or SafetensorError if the file cannot be read or is damaged.
    """
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
        metadata: dict[str, str] = file.metadata() or {}
    header, expected = metadata.pop(_HEADER, ""), metadata.pop(_CONTENT, "")
    if header != _header_checksum(tensors, metadata) or (content and expected != _content_checksum(tensors)):
        raise OSError("its checksum does not match")
    return tensors, metadata


def _header_checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    layout = [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in sorted(tensors.items())]
    return f"{zlib.crc32(json.dumps([layout, sorted(metadata.items())]).encode()):08x}"


def _content_checksum(tensors: Mapping[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
