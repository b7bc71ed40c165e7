"""Prompts and captions as ComfyUI reads them: weights in brackets, and chunks of CLIP's length."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ...errors import UserError
from . import families

MAX_TOKENS = 77
"""Length of a chunk, with its start and end token."""
START_TOKEN, END_TOKEN = 49406, 49407
_ROOM = MAX_TOKENS - 2
_LONG_PART = 8
"""A part of a prompt with fewer tokens than this is not divided between two chunks."""
_BRACKET_WEIGHT = 1.1
_ESCAPES = {"\\(": "\0open", "\\)": "\0close"}
"""Escaped brackets, and what stands for them while the others are read."""
_EMBEDDING = re.compile(r"(?:^|(?<=\s))embedding:\S*")


class Prompt(NamedTuple):
    """The tokens of a prompt in n chunks, each from a start token to an end token and padding."""

    ids: Tensor
    """int64 [n, 77]."""
    weights: Tensor
    """float32 [n, 77]; 1 outside brackets."""


def read_prompt(prompt: str, *, padding: int = END_TOKEN) -> Prompt:
    """Return the tokens of a prompt, filled with `padding` after the end token of each chunk.

    Raises UserError for a textual inversion, and for brackets that are nested too deeply.
    """
    chunks: list[list[tuple[int, float]]] = [[]]
    for text, weight in weighted_parts(prompt):
        if found := _EMBEDDING.search(text):
            raise UserError(
                f"the prompt {prompt!r} names a textual inversion, {found[0]}, which the engine diffusers does not "
                "read: leave it out, or use base.engine=comfyui"
            )
        tokens = [(token, weight) for token in clip_tokenizer()(text)["input_ids"][1:-1]]
        divisible = len(tokens) >= _LONG_PART
        while tokens:
            room = _ROOM - len(chunks[-1])
            taken = room if divisible or len(tokens) <= room else 0
            chunks[-1] += tokens[:taken]
            tokens = tokens[taken:]
            if tokens:
                chunks.append([])
    rows = [[(START_TOKEN, 1.0), *chunk, (END_TOKEN, 1.0)] for chunk in chunks]
    rows = [row + [(padding, 1.0)] * (MAX_TOKENS - len(row)) for row in rows]
    return Prompt(
        torch.tensor([[token for token, _ in row] for row in rows]),
        torch.tensor([[weight for _, weight in row] for row in rows]),
    )


def weighted_parts(prompt: str) -> list[tuple[str, float]]:
    r"""Divide a prompt into parts of one weight each: (a) has 1.1, ((a)) 1.1 * 1.1, (a:1.5) 1.5; \( is a bracket.

    Raises UserError for brackets that are nested too deeply.
    """
    for escaped, substitute in _ESCAPES.items():
        prompt = prompt.replace(escaped, substitute)
    try:
        parts = list(_parts(prompt, 1.0))
    except RecursionError:
        raise UserError(f"the prompt {prompt[:40]!r} ... has brackets that are nested too deeply: use fewer") from None
    return [(_unescaped(text), weight) for text, weight in parts]


def _unescaped(text: str) -> str:
    for escaped, substitute in _ESCAPES.items():
        text = text.replace(substitute, escaped[1:])
    return text


def _parts(text: str, weight: float) -> Iterator[tuple[str, float]]:
    for piece in _outer_brackets(text):
        if len(piece) > 1 and piece.startswith("(") and piece.endswith(")"):
            yield from _parts(*_own_weight(piece[1:-1], weight))
        else:
            yield piece, weight


def _outer_brackets(text: str) -> Iterator[str]:
    """Yield each bracket that is in no other one, and each text between two of them.

    After a closing bracket too many, brackets are text until as many have been opened.
    """
    depth, start = 0, 0
    for at, letter in enumerate(text):
        if letter == "(":
            if depth == 0 and start < at:
                yield text[start:at]
                start = at
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                yield text[start : at + 1]
                start = at + 1
    if start < len(text):
        yield text[start:]


def _own_weight(text: str, weight: float) -> tuple[str, float]:
    """Return the text of a bracket, and the weight that it gives or, without one, 1.1 times the weight around it."""
    before, colon, after = text.rpartition(":")
    if colon and before:
        try:
            return before, float(after)
        except ValueError:
            pass  # it is text
    return text, weight * _BRACKET_WEIGHT


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """Return CLIP's byte-pair tokenizer, built from its merge rules in `families/clip_merges.txt`."""
    merges = (families.ROOT / "clip_merges.txt").read_text(encoding="utf-8").splitlines()
    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=pairs)
