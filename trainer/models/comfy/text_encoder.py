"""ComfyUI's text encoders: captions to conditioning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..conditioning import Conditioning
from .conditioning import to_row


class HostTextEncoder:
    """The host's CLIP object, which may hold several text encoders."""

    def __init__(self, clip: Any) -> None:
        self.clip = clip

    def encode(self, captions: Sequence[str]) -> list[Conditioning]:
        """Encode each caption as the node CLIP Text Encode does, weights in brackets included."""
        return [to_row(self.clip.encode_from_tokens_scheduled(self.clip.tokenize(caption))) for caption in captions]

    def to(self, device: torch.device) -> HostTextEncoder:
        """Return the encoder; the host moves it to its device while it encodes."""
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all weights."""
        yield from self.clip.cond_stage_model.parameters()
