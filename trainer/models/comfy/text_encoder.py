"""ComfyUI's text encoders: captions to conditioning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn

from ...errors import UserError
from ..conditioning import Conditioning
from .conditioning import to_row
from .read_as_one import ReadAsOne
from .recognize import META


def skip_layers(clip: Any, clip_skip: int) -> None:
    """Let a CLIP object use the layer `clip_skip` from the last, as the node CLIP Set Last Layer does with its sign.

    Raises UserError if one of its text encoders has fewer layers; the host would use the last.
    """
    layers = min(model.num_layers for model in clip.cond_stage_model.children() if hasattr(model, "num_layers"))
    if not 1 <= clip_skip <= layers:
        raise UserError(f"base.clip_skip is {clip_skip}, but the text encoder has {layers} layers: use one of these")
    clip.clip_layer(-clip_skip)


class HostTextEncoder:
    """The host's CLIP object, which may hold several text encoders."""

    def __init__(self, clip: Any) -> None:
        self.clip = clip

    def encode(self, captions: Sequence[str]) -> list[Conditioning]:
        """Encode each caption as the node CLIP Text Encode does, weights in brackets included.

        With weights on the meta device, the result has shapes only. Raises UserError if the text encoder returns
        CONDITIONING that training cannot use.
        """
        is_meta = any(weight.is_meta for weight in self.parameters())
        encode = self._encode_shapes if is_meta else self.clip.encode_from_tokens_scheduled
        rows = []
        for caption in captions:
            conditioning = encode(self.clip.tokenize(caption))
            try:
                rows.append(to_row(conditioning))
            except ValueError as error:
                raise UserError(f"the caption {caption!r} cannot be used: {error}") from error
        return rows

    def chunks(self, caption: str) -> int:
        """Return the number of chunks in which a caption is encoded, of the encoder that has the most."""
        return max(len(chunks) for chunks in self.clip.tokenize(caption).values())

    @torch.no_grad()
    def _encode_shapes(self, tokens: Any) -> Any:
        """Return the CONDITIONING on the meta device, as CLIP.encode_from_tokens, without its memory management."""
        import comfy.model_management

        network = self.clip.cond_stage_model
        network.reset_clip_options()
        network.set_clip_options({"execution_device": META})
        with mock.patch.object(comfy.model_management, "intermediate_device", lambda: META), ReadAsOne():
            context, pooled, *more = network.encode_token_weights(tokens)
        return [[context, {"pooled_output": pooled, **(more[0] if more else {})}]]

    def to(self, device: torch.device) -> HostTextEncoder:
        """Return the encoder; the host moves it to its device while it encodes."""
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all weights."""
        yield from self.clip.cond_stage_model.parameters()
