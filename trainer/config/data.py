"""The section [data]: the pictures and captions to distill on."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import UserError
from .schema import MAY_CHANGE, PATH, number


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several sources of pictures: a table `[[data.sources]]`."""

    path: str = field(metadata=PATH)
    """A folder of images with captions (.txt, .caption, metadata.jsonl or metadata.csv), a .tar or .tar.gz shard or a
    pattern such as `shards/*.tar`, or a .txt file with one prompt per line."""
    repeats: float = number(1.0, 0.001, 10000.0)
    """How often each picture of this source is shown in an epoch; 0.5 shows each in every second epoch. Pictures in a
    subfolder `10_name` are shown 10 times as often."""
    weight: float = number(0.0, 0.0)
    """Instead of `repeats`: this source's share of an epoch, relative to the weights of the other sources."""


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How the teacher draws latents for prompts without pictures."""

    per_prompt: int = number(1, 1, 10000)
    """Number of pictures for each prompt, each from different noise."""
    steps: int = number(25, 1, 50)
    """Number of sampling steps of DPM-Solver++(2M), which is deterministic."""
    guidance: float = number(6.0, 1.0)
    """Guidance scale with which the teacher draws; 1 means no guidance."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The pictures to distill on."""

    folder: str = field(default="", metadata=PATH)
    """Folder of images with captions: each in a .txt or .caption file of the image's name, or all in one metadata.jsonl
    or metadata.csv. The images in a subfolder `10_name` are shown 10 times in an epoch."""
    prompts: str = field(default="", metadata=PATH)
    """Text file with one prompt per line; the teacher draws the pictures."""
    sources: tuple[SourceConfig, ...] = ()
    """Several sources, each a table `[[data.sources]]`."""
    draw: DrawConfig = field(default_factory=DrawConfig)
    resolution: int = number(512, 8, 4096)
    """Pictures have at most resolution^2 pixels; must be a multiple of the latent stride, which is 8 for UNets."""
    buckets: bool = True
    """Keep the aspect ratio of pictures, in buckets from 1:4 to 4:1. If false, pictures are cropped to squares."""
    bucket_step: int = number(64, 8, 512)
    """The sides of buckets are multiples of this number; must be a multiple of the latent stride."""
    upscale: bool = False
    """Enlarge pictures that are smaller than `resolution`. If false, they get smaller buckets."""
    skip_bad: bool = False
    """Leave out and count pictures that do not decode, are too small or have no caption. If false, they are an
    error."""
    caption_dropout: float = number(0.0, 0.0, 1.0)
    """Fraction of the captions that are replaced by the empty caption."""
    caption_prefix: str = ""
    """Words in front of every caption and prompt, such as a trigger word; a space follows them."""
    shuffle_tags: int = number(0, 0, 1000)
    """Number of orders in which the tags of a caption, separated by commas, are encoded; each step takes one of them. 0
    keeps the order of the caption."""
    keep_tags: int = number(0, 0, 1000)
    """With `shuffle_tags`: number of tags at the start of each caption that stay there."""
    cache: str = field(default="", metadata=MAY_CHANGE | PATH)
    """Folder of cached latents and embeddings, which several runs may share; by default `.tcd-cache` beside the
    first source of the data, or a folder in the user's cache where nothing can be written there."""

    def __post_init__(self) -> None:
        if self.bucket_step > self.resolution:
            raise UserError(
                f"data.bucket_step is {self.bucket_step}, above data.resolution, {self.resolution}: use at most that"
            )
        if not (self.folder or self.prompts or self.sources):
            raise UserError("data.folder is missing: name a folder of pictures, or set data.prompts or data.sources")
        weighted = [bool(source.weight) for _, source in self.named_sources]
        if any(weighted) and not all(weighted):
            raise UserError(
                f"data.sources: {sum(weighted)} of {len(weighted)} sources have a weight: give one to all or to none"
            )

    @property
    def named_sources(self) -> list[tuple[str, SourceConfig]]:
        """All sources, each with its key for messages."""
        alone = [(f"data.{key}", getattr(self, key)) for key in ("folder", "prompts")]
        several = [(f"data.sources[{i}].path", source) for i, source in enumerate(self.sources)]
        return [(key, SourceConfig(path=path)) for key, path in alone if path] + several

    @property
    def summary(self) -> str:
        """The paths of the sources, in one line."""
        return ", ".join(source.path for _, source in self.named_sources)
