"""Captions -> conditioning: CLIP's tokenizer, and the CLIP text encoders as each family uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..conditioning import Conditioning
from . import families, ldm

MAX_TOKENS = 77
END_TOKEN = 49407


class ClipEncoder(NamedTuple):
    """One of a family's text encoders: where to find its weights, and how its captions are padded."""

    part: str
    """Subfolder of a diffusers folder."""
    prefixes: tuple[str, ...]
    """Prefixes that its tensors can have in a single file; files are written with the first."""
    locations: Callable[[Iterable[str], str], dict[str, ldm.TensorLocation]]
    """(tensor names of the model, prefix) -> location of each tensor in a single file."""
    padding: int
    """Token that fills a caption to MAX_TOKENS."""


_OPENAI = ClipEncoder(
    "text_encoder",
    ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
    ldm.clip_locations,
    padding=END_TOKEN,
)
_SGM = "conditioner.embedders."  # prefix of the text encoders in Stability AI's generative-models
CLIPS: dict[families.Family, tuple[ClipEncoder, ...]] = {
    "sd15": (_OPENAI,),
    "tiny": (_OPENAI,),
    # OpenCLIP pads with token 0.
    "sd2": (
        ClipEncoder("text_encoder", ("cond_stage_model.model.", f"{_SGM}0.model."), ldm.open_clip_locations, padding=0),
    ),
    "sdxl": (
        ClipEncoder("text_encoder", (f"{_SGM}0.transformer.text_model.",), ldm.clip_locations, padding=END_TOKEN),
        ClipEncoder("text_encoder_2", (f"{_SGM}1.model.",), ldm.open_clip_locations, padding=0),
    ),
}


class TextEncoder(nn.ModuleList):
    """The CLIP models of a family, used as in the training of its UNet.

    SD1.5 and SD2.x use the last hidden state after the final norm; SD2.x's configuration leaves out the last layer of
    OpenCLIP-H, so its last hidden state is the penultimate one of the full model. SDXL uses the penultimate hidden
    states of both encoders, without the norm and concatenated, and the projected end-of-text token of the second
    encoder as `pooled`.
    """

    def __init__(self, family: families.Family, models: Sequence[PreTrainedModel]) -> None:
        """models: in the order of CLIPS[family]."""
        super().__init__(models)
        self.clips = CLIPS[family]

    def models(self) -> Iterator[PreTrainedModel]:
        """Yield the models, in the order of CLIPS[family]."""
        return self.children()

    def encode(self, captions: Sequence[str]) -> list[Conditioning]:
        """Encode each caption as one row: `context` [1, 77, D] and, for SDXL, `pooled` [1, P]."""
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
    """Return CLIP's byte-pair tokenizer, built from its merge rules in `families/clip_merges.txt`."""
    merges = (families.ROOT / "clip_merges.txt").read_text(encoding="utf-8").splitlines()
    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=MAX_TOKENS)


def tokenize(captions: Sequence[str], *, padding: int = END_TOKEN) -> Tensor:
    """Return token ids, int64 [B, 77], of captions, truncated or filled with `padding` after the end token."""
    encoded = clip_tokenizer()(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    return ids.masked_fill((ids == END_TOKEN).cumsum(1) > 1, padding)
