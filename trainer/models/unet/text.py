"""Captions -> conditioning, by the CLIP text encoders as each family uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import UserError
from ..conditioning import Conditioning
from . import families, ldm
from .prompt import END_TOKEN, Prompt, read_prompt


class ClipEncoder(NamedTuple):
    """One of a family's text encoders: where to find its weights, how it pads captions, and which layer is used."""

    part: str
    """Subfolder of a diffusers folder."""
    prefixes: tuple[str, ...]
    """Prefixes that its tensors can have in a single file; files are written with the first."""
    locations: Callable[[Iterable[str], str], dict[str, ldm.TensorLocation]]
    """(tensor names of the model, prefix) -> location of each tensor in a single file."""
    padding: int
    """Token that fills a chunk after its end token."""
    layer: int = 1
    """The layer whose output is used, counted from the last layer of the original model, which is 1."""
    left_out: int = 0
    """How many of the original model's last layers the configuration leaves out."""
    normed: bool = True
    """Whether the final norm is applied to the layer's output."""


_OPENAI = ClipEncoder(
    "text_encoder",
    ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
    ldm.clip_locations,
    padding=END_TOKEN,
)
_CHUNKS_PER_CALL = 64  # the states of all layers are in memory
_SGM = "conditioner.embedders."  # prefix of the text encoders in Stability AI's generative-models
CLIPS: dict[families.Family, tuple[ClipEncoder, ...]] = {
    "sd15": (_OPENAI,),
    "tiny": (_OPENAI,),
    # OpenCLIP pads with token 0.
    "sd2": (
        ClipEncoder(
            "text_encoder",
            ("cond_stage_model.model.", f"{_SGM}0.model."),
            ldm.open_clip_locations,
            padding=0,
            layer=2,
            left_out=1,
        ),
    ),
    "sdxl": (
        ClipEncoder(
            "text_encoder",
            (f"{_SGM}0.transformer.text_model.",),
            ldm.clip_locations,
            padding=END_TOKEN,
            layer=2,
            normed=False,
        ),
        ClipEncoder("text_encoder_2", (f"{_SGM}1.model.",), ldm.open_clip_locations, padding=0, layer=2, normed=False),
    ),
}


def check_clip_skip(family: families.Family, clip_skip: int) -> None:
    """Raise UserError if a text encoder of the family has no such layer; 0 is the family's own."""
    for clip in CLIPS[family] if clip_skip else ():
        first, last = 1 + clip.left_out, families.config(family, clip.part)["num_hidden_layers"] + clip.left_out
        if not first <= clip_skip <= last:
            raise UserError(
                f"base.clip_skip is {clip_skip}, but the {clip.part} of {family} has the layers {first} to {last}, "
                f"counted from the last: use one of these, or 0 for its usual one, {clip.layer}"
            )


class TextEncoder(nn.ModuleList):
    """The CLIP models of a family, used as in the training of its UNet and in ComfyUI.

    SD1.5 uses the last hidden state, and SD2.x the penultimate one, after the final norm. SDXL uses the penultimate
    hidden states of both encoders, without the norm and concatenated, and the projected end-of-text token of the
    second encoder, in its first chunk, as `pooled`.
    """

    def __init__(self, family: families.Family, models: Sequence[PreTrainedModel]) -> None:
        """models: in the order of CLIPS[family]."""
        super().__init__(models)
        self.clips = CLIPS[family]
        self.clip_skip = 0
        """The layer to use instead of the family's own, counted as ClipEncoder.layer; 0 for the family's own."""

    def models(self) -> Iterator[PreTrainedModel]:
        """Yield the models, in the order of CLIPS[family]."""
        return self.children()

    def chunks(self, caption: str) -> int:
        """Return the number n of chunks of 77 tokens that a caption has."""
        return len(read_prompt(caption).ids)

    def encode(self, captions: Sequence[str]) -> list[Conditioning]:
        """Encode each caption as one row: `context` [1, 77 n, D] for n chunks and, for SDXL, `pooled` [1, P].

        Raises UserError if `read_prompt` does.
        """
        encoded = [self._encode(clip, model, captions) for clip, model in zip(self.clips, self.models(), strict=True)]
        return [
            Conditioning.of(context=torch.cat([context for context, _ in each], dim=-1), pooled=each[-1][1])
            for each in zip(*encoded, strict=True)
        ]

    def _encode(self, clip: ClipEncoder, model: Any, captions: Sequence[str]) -> list[tuple[Tensor, Tensor | None]]:
        """Return (context [1, 77 n, D], pooled [1, P] of SDXL's second encoder or None) of each caption."""
        prompts = [read_prompt(caption, padding=clip.padding) for caption in captions]
        weighted = any((prompt.weights != 1).any() for prompt in prompts)
        rows = [*prompts, read_prompt("", padding=clip.padding)] if weighted else prompts
        ids = torch.cat([prompt.ids for prompt in rows]).to(model.device)
        parts = [self._states(clip, model, part) for part in ids.split(_CHUNKS_PER_CALL)]
        states = torch.cat([part for part, _ in parts])
        pooled = [part for _, part in parts if part is not None]
        ends = torch.cat(pooled) if pooled else None
        encoded, first = [], 0
        for prompt in prompts:
            chunks = slice(first, first + len(prompt.ids))
            context = _weight(states[chunks], states[-1], prompt) if weighted else states[chunks]
            encoded.append((context.flatten(0, 1)[None], None if ends is None else ends[first : first + 1]))
            first = chunks.stop
        return encoded

    @torch.no_grad()
    def _states(self, clip: ClipEncoder, model: Any, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (the states of the layer in use [n, 77, D], pooled [n, P] or None) of n chunks."""
        output = model(ids, output_hidden_states=True)
        states = output.hidden_states[clip.left_out - (self.clip_skip or clip.layer)]
        if clip.normed:
            states = getattr(model, "text_model", model).final_layer_norm(states)
        return states, output.text_embeds if "text_embeds" in output else None


def _weight(states: Tensor, empty: Tensor, prompt: Prompt) -> Tensor:
    """Return the states [n, 77, D] of a prompt at its weights: 0 gives the states of the empty prompt, [77, D]."""
    return torch.lerp(empty, states, prompt.weights.to(states)[..., None])
