"""Fingerprints: a short hash of the content of model files, without reading all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLES, _SAMPLE_BYTES = 256, 2**16
_WEIGHTS = {".safetensors", ".bin"}


def fingerprint(source: Path) -> str:
    """Hash a model file, or all weight files of a folder: of each its length, and 64 KiB from each of 256 places."""
    files = [source] if source.is_file() else sorted(file for file in source.rglob("*") if file.suffix in _WEIGHTS)
    return hashlib.sha256("\n".join(map(_sampled, files)).encode()).hexdigest()[:16]


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    content = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for number in range(_SAMPLES):
            file.seek(number * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
            content.update(file.read(_SAMPLE_BYTES))
    return content.hexdigest()
