"""Fingerprints of a model's files: short hashes that do not read all of a large file."""

from __future__ import annotations

from pathlib import Path

from ...tcd.fingerprint import combined, hash_samples

_WEIGHTS = {".safetensors", ".bin"}


def fingerprint(source: Path) -> str:
    """Return a hash of a model file, or of all weight files in a folder, as 16 hexadecimal digits.

    Each file contributes its length and samples of its content.
    """
    files = [source] if source.is_file() else sorted(file for file in source.rglob("*") if file.suffix in _WEIGHTS)
    return combined(map(_hash_samples, files))


def _hash_samples(path: Path) -> str:
    with open(path, "rb") as file:
        return hash_samples(file, path.stat().st_size)
