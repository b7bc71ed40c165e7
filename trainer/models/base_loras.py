"""The user's own LoRAs on the base, `[[base.loras]]`: what they change for each engine alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...tcd.fingerprint import combined
from ..config.base import BaseConfig
from .fingerprint import fingerprint
from .seam import Fingerprints


class PlacedLora(NamedTuple):
    """A LoRA on the base, and which parts of the base it changes."""

    path: Path
    strength: float
    changes_text: bool
    """Whether it has weights for a text encoder."""


def fingerprints_with(loras: Sequence[PlacedLora], plain: Fingerprints) -> Fingerprints:
    """Return the fingerprints of a base with LoRAs; plain: without them.

    Latents from the autoencoder stay valid, and captions if no LoRA changes a text encoder.
    """
    if not loras:
        return plain
    text = [lora for lora in loras if lora.changes_text]
    return Fingerprints(_hash(plain.base, loras), plain.autoencoder or plain.base, _hash(plain.base, text))


def lora_note(base: BaseConfig) -> tuple[str, ...]:
    """Return a note for the user about the LoRAs on the base, if there are any."""
    if not base.loras:
        return ()
    return (f"the new LoRA is trained on the base with {base.lora_names}: load the same where it is used",)


def _hash(base: str, loras: Sequence[PlacedLora]) -> str:
    if not loras:
        return base
    return combined([base, *(f"{fingerprint(lora.path)} {lora.strength!r}" for lora in loras)])
