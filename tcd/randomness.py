"""Random numbers as a function of (seed, purpose, step), so that no generator state has to be saved."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """Return a CPU generator; the same arguments give the same random numbers on every machine."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
