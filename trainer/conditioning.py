"""Captions to what the UNet attends to: CLIP's tokenizer and text encoder, as SD1.5 uses them.

Flows in: captions.  Flows out: token ids [B, 77] and embeddings [B, 77, C].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from trainer import bases

MAX_TOKENS = 77


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, built from its merge rules, which stand in `bases/clip_merges.txt`."""
    merges = (bases.ROOT / "clip_merges.txt").read_text(encoding="utf-8").splitlines()
    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs)


def tokenize(captions: Sequence[str]) -> Tensor:
    """Token ids [B, 77] of `captions`, cut or padded with the end token to CLIP's length."""
    encoded = clip_tokenizer()(
        list(captions), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    ids: Tensor = encoded["input_ids"]
    return ids


def encode(text_encoder: CLIPTextModel, captions: Sequence[str]) -> Tensor:
    """Embeddings [B, 77, C] of `captions`: the last hidden state after the final norm, as SD1.5 was trained on."""
    ids = tokenize(captions).to(text_encoder.device)
    with torch.no_grad():
        embeddings: Tensor = text_encoder(ids).last_hidden_state
    return embeddings
