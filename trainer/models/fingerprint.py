"""Fingerprints: a short hash of a model's files that does not read all of a large file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_SAMPLES, _SAMPLE_BYTES = 256, 2**16
_WEIGHTS = {".safetensors", ".bin"}


def fingerprint(source: Path) -> str:
    """Return a hash of a model file, or of all weight files in a folder, as 16 hexadecimal digits.

    Each file contributes its length and 256 samples of 64 KiB, evenly spaced.
    """
    files = [source] if source.is_file() else sorted(file for file in source.rglob("*") if file.suffix in _WEIGHTS)
    return combined(map(_hash_samples, files))


def combined(parts: Iterable[str]) -> str:
    """Return one fingerprint for several hashes and other facts, in this order, as 16 hexadecimal digits."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _hash_samples(path: Path) -> str:
    size = path.stat().st_size
    content = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for number in range(_SAMPLES):
            file.seek(number * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
            content.update(file.read(_SAMPLE_BYTES))
    return content.hexdigest()
