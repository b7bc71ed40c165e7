"""The text that is encoded for a caption: with the prefix of the configuration, and its tags in several orders."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...tcd.randomness import generator
from ..config.settings import DataConfig
from ..models.seam import Checkpoint
from .sources import PromptFile, Source, open_sources


def with_prefix(caption: str, data: DataConfig) -> str:
    """Return the caption after `data.caption_prefix`."""
    return f"{data.caption_prefix.strip()} {caption}".strip()


def caption_variants(caption: str, data: DataConfig) -> list[str]:
    """Return the texts to encode for a caption, from which each step draws one.

    They are functions of the caption alone, so that several runs can share them.
    """
    if not data.shuffle_tags:
        return [with_prefix(caption, data)]
    tags = [tag for tag in map(str.strip, caption.split(",")) if tag]
    kept, shuffled = tags[: data.keep_tags], tags[data.keep_tags :]
    variants = []
    for number in range(data.shuffle_tags):
        order = torch.randperm(len(shuffled), generator=generator(0, f"tags of {caption}", number)).tolist()
        variants.append(with_prefix(", ".join([*kept, *(shuffled[i] for i in order)]), data))
    return variants


def long_captions(data: DataConfig, checkpoint: Checkpoint) -> int:
    """Return how many captions are encoded in several chunks, without loading weights.

    Raises UserError if a source cannot be opened or a caption cannot be read.
    """
    text_encoder = checkpoint.load_text_encoder(torch.device("meta"))
    captions = (caption for source in open_sources(data) for caption in _captions(source))
    return sum(text_encoder.chunks(with_prefix(caption, data)) > 1 for caption in captions)


def _captions(source: Source) -> Iterator[str]:
    if isinstance(source, PromptFile):
        yield from source.captions()
    else:
        yield from (sample.caption for sample in source.samples() if sample.caption)
