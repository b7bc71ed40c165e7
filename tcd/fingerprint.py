"""Fingerprints: a short hash of a model's file that does not read all of a large one.

The trainer writes that of the base into a LoRA file, and TCDLoraLoader compares it with that of the model.
"""

import hashlib
from collections.abc import Iterable
from typing import BinaryIO

_SAMPLES, _SAMPLE_BYTES = 256, 2**16


def combined(parts: Iterable[str]) -> str:
    """Return one fingerprint for the `hash_samples` of files and other facts, in this order: 16 hexadecimal digits."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def hash_samples(file: BinaryIO, size: int) -> str:
    """Return a hash of the size, in bytes, of an open file and of 256 samples of 64 KiB, evenly spaced."""
    content = hashlib.sha256(str(size).encode())
    for number in range(_SAMPLES):
        file.seek(number * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
        content.update(file.read(_SAMPLE_BYTES))
    return content.hexdigest()
