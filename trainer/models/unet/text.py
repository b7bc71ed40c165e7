"""Captions to what the UNet is told: CLIP's tokenizer, and the text encoders as each family uses them.

Flows in: captions.  Flows out: token ids [B, 77] and a `Conditioning`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..conditioning import Conditioning
from . import families as bases
from . import ldm

MAX_TOKENS = 77
END = 49407


class Clip(NamedTuple):
    """One of a family's text encoders: where its weights stand, and what comes after a caption's end."""

    part: str
    """Its folder in a diffusers folder."""
    prefixes: tuple[str, ...]
    """What its names in a single file may begin with; the first is what we write."""
    places: Callable[[Iterable[str], str], dict[str, ldm.Place]]
    """(the model's names, a prefix) -> where they stand in a single file."""
    padding: int
    """The token that fills a caption up to CLIP's length."""


_OPENAI = Clip(
    "text_encoder",
    ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
    ldm.clip_places,
    padding=END,
)
_SGM = "conditioner.embedders."  # where the later code base of Stability AI keeps the text encoders
CLIPS: dict[bases.Family, tuple[Clip, ...]] = {
    "sd15": (_OPENAI,),
    "tiny": (_OPENAI,),
    # OpenCLIP pads with zeros, which are exclamation marks.
    "sd2": (Clip("text_encoder", ("cond_stage_model.model.", f"{_SGM}0.model."), ldm.open_clip_places, padding=0),),
    "sdxl": (
        Clip("text_encoder", (f"{_SGM}0.transformer.text_model.",), ldm.clip_places, padding=END),
        Clip("text_encoder_2", (f"{_SGM}1.model.",), ldm.open_clip_places, padding=0),
    ),
}


class TextEncoder(nn.ModuleList):
    """The CLIP models of a family, used as its UNet was trained with them.

    SD1.5 and SD2.x take the last hidden state after the final norm. SD2.x's OpenCLIP-H is loaded without its last
    layer, so that this is the penultimate one. SDXL takes the penultimate hidden states of both encoders without the
    norm, concatenated, and the second encoder's projection of the end-of-text token as `pooled`.
    """

    def __init__(self, family: bases.Family, models: Sequence[PreTrainedModel]) -> None:
        """Take the models in the order of `CLIPS`."""
        super().__init__(models)
        self.clips = CLIPS[family]

    def models(self) -> Iterator[PreTrainedModel]:
        """The models, in the order of `CLIPS`."""
        return self.children()

    def encode(self, captions: Sequence[str]) -> list[Conditioning]:
        """Encode captions, one row each: `context` [1, 77, D] and, for SDXL, `pooled` [1, P]."""
        with torch.no_grad():
            outputs: list[Any] = [
                model(tokenize(captions, padding=clip.padding).to(model.device), output_hidden_states=True)
                for clip, model in zip(self.clips, self.models(), strict=True)
            ]
        if len(outputs) == 1:
            encoded = Conditioning.of(context=outputs[0].last_hidden_state)
        else:
            context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
            encoded = Conditioning.of(context=context, pooled=outputs[-1].text_embeds)
        return [encoded[row : row + 1] for row in range(len(captions))]


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, built from its merge rules, which stand in `bases/clip_merges.txt`."""
    merges = (bases.ROOT / "clip_merges.txt").read_text(encoding="utf-8").splitlines()
    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=MAX_TOKENS)


def tokenize(captions: Sequence[str], *, padding: int = END) -> Tensor:
    """Token ids [B, 77] of `captions`, cut to CLIP's length or filled up to it after their end."""
    encoded = clip_tokenizer()(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    return ids.masked_fill((ids == END).cumsum(1) > 1, padding)
