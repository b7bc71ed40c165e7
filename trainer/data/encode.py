"""Fill the cache: run the VAE, the text encoder and, for prompts alone, the teacher over what is not in it yet.

Flows in: the sources of a configuration.  Flows out: rows in the cache's stores, and at the end its index.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from tqdm import tqdm

from ..config.memory_advice import caching_advice, memory_advice
from ..config.settings import Config
from ..errors import UserError
from ..models import open_checkpoint
from ..models.conditioning import Conditioning
from ..models.seam import Autoencoder, Checkpoint, Model, TextEncoder
from ..models.solver import draw_latents
from ..randomness import generator
from .buckets import Fit, Size
from .cache import Entry, Index, layout, merge_parts, open_cached
from .dataset import Dataset, caption_of
from .sources import PictureSource, Prompts, open_sources
from .store import Store, digest, open_shard
from .survey import (
    Inspection,
    Survey,
    configured_buckets,
    drawn_bucket,
    inspect_sample,
    parallel_map,
    raise_for_problems,
)

CACHED_DTYPE = torch.float16
"""Of cached latents and embeddings: float16 is eight times more precise than bfloat16 here, and the values are far
below its maximum."""
_PIXELS, _CAPTIONS = 8 * 512 * 512, 64
"""How many are encoded together on a GPU, of pixels so many that the VAE takes about 5 GiB for them.  On a CPU each
picture and caption is alone, so that its row has the same bits whatever else is missing: a run that was killed while it
filled the cache still ends as one that was not."""


def pictures_together(bucket: Size, device: torch.device) -> int:
    """How many pictures of a bucket are encoded, or drawn, in one call: one at least."""
    return 1 if device.type == "cpu" else max(_PIXELS // (bucket.height * bucket.width), 1)


def prepare(
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    *,
    part: int = 0,
    parts: int = 1,
    total: int | None = None,
    wait: Callable[[], None] = lambda: None,
) -> Dataset:
    """The data of a configuration, from the cache; what is missing in it is computed first, on `device`.

    total: how many samples there are, for the progress bar.  Of several processes each computes the part `part` of the
    data, and `wait` returns when all have done theirs.
    Raises UserError for data that cannot be used.
    """
    cached = open_cached(config, dtype)
    if cached is None:
        fill(config, device, dtype, part=part, parts=parts, total=total)
        wait()
        if part == 0:
            merge_parts(config, dtype)
        wait()
        cached = open_cached(config, dtype)
    if cached is None:
        raise UserError("the data changed while they were cached: start again")
    return cached.dataset


def fill(
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    *,
    part: int = 0,
    parts: int = 1,
    total: int | None = None,
    verify: bool = False,
) -> None:
    """Compute every row of every `parts`-th file from `part` on that the cache does not have, and write the index.

    total: how many samples there are, for the progress bar.  verify: read all files that are there, too, and compute
    anew what does not have its checksum; return when then nothing is missing.

    Killed at any moment, it goes on where it was.  Raises UserError for data that cannot be used, and MemoryFullError.
    """
    checkpoint = open_checkpoint(config.base)
    where = layout(config, checkpoint, dtype)
    stores = {kind: Store(where.store(kind), verify=verify) for kind in where.settings}
    if verify and open_cached(config, dtype):
        return
    filling = _Filling(config, checkpoint, device, dtype, stores)
    bar = tqdm(total=total, desc="caching", unit="img", disable=part > 0)
    with bar, memory_advice(caching_advice(config, device, dtype)):
        for number, source in enumerate(open_sources(config.data)):
            if isinstance(source, Prompts):
                filling.read_prompts(number, source, part, parts)
            else:
                filling.read_pictures(number, source, part, parts, bar)
        filling.finish_encoding()
        filling.draw(bar)
    raise_for_problems(filling.found, config.data)
    filling.index().write(where.index(config, part, parts))


@dataclass
class _Filling:
    """What is on its way into the cache."""

    config: Config
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    stores: dict[str, Store]
    found: Survey = field(default_factory=Survey)
    entries: dict[tuple[int, Size], list[tuple[str, bytes, bytes]]] = field(default_factory=lambda: defaultdict(list))
    """By source and bucket, for each picture: the store of its latent, its digest there, and that of its caption."""
    _pictures: dict[Size, dict[bytes, Inspection]] = field(default_factory=lambda: defaultdict(dict))
    _captions: dict[bytes, str] = field(default_factory=dict)
    _drawings: dict[bytes, str] = field(default_factory=dict)
    """The prompts to be drawn, by the digest of the drawing."""

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """Loaded at the first picture that the cache does not have."""
        return self.checkpoint.load_autoencoder(self.device)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """Loaded at the first caption that the cache does not have."""
        return self.checkpoint.load_text_encoder(self.dtype, self.device)

    def read_pictures(self, number: int, source: PictureSource, part: int, parts: int, bar: tqdm) -> None:
        """Go through a source, and encode what is new."""
        store, buckets = self.stores["latents"], configured_buckets(self.config.data)
        looks = parallel_map(
            lambda sample: inspect_sample(sample, buckets, is_cached=store.__contains__, pixels=True),
            source.samples(part, parts),
        )
        for look in looks:
            bar.update()
            self.found.count(look)
            if look.problems:
                continue
            bucket = look.fit.bucket if look.fit else Size.parse(store.kind(look.key))
            self.entries[number, bucket].append(("latents", look.key, self._caption(look.sample.caption)))
            if look.fit and look.key not in store:
                self._pictures[bucket][look.key] = look
            if len(self._pictures[bucket]) >= pictures_together(bucket, self.device):
                self._encode_pictures(bucket)

    def read_prompts(self, number: int, source: Prompts, part: int, parts: int) -> None:
        """Go through prompts, and note what the teacher has to draw."""
        bucket, store = drawn_bucket(self.config.data), self.stores["drawn"]
        for prompt in source.captions()[part::parts]:
            for drawing in range(self.config.data.draw.per_prompt):
                key = digest(f"{drawing} {prompt}".encode())
                self.entries[number, bucket].append(("drawn", key, self._caption(prompt)))
                self.found.seen += 1
                if key not in store:
                    self._drawings[key] = prompt

    def finish_encoding(self) -> None:
        """Encode the rest, write it to the disk, and free the encoders."""
        for bucket in list(self._pictures):
            self._encode_pictures(bucket)
        self._caption("")
        self._encode_captions()
        self.stores["latents"].flush()
        self.stores["captions"].flush()
        for encoder in ("autoencoder", "text_encoder"):
            self.__dict__.pop(encoder, None)

    def draw(self, bar: tqdm) -> None:
        """Let the teacher draw what is missing of the prompts."""
        if not self._drawings:
            return
        model: Model = self.checkpoint.load(self.dtype, self.device)
        bucket, draw, store = drawn_bucket(self.config.data), self.config.data.draw, self.stores["drawn"]
        sizes = torch.tensor(Fit(bucket, bucket, bucket, 0, 0).sizes, dtype=torch.int32)
        waiting = list(self._drawings.items())
        together = pictures_together(bucket, self.device)
        shape = self.checkpoint.latents.shape(*bucket)
        for start in range(0, len(waiting), together):
            some = waiting[start : start + together]
            noise = [torch.randn(shape, generator=generator(0, f"drawing {key.hex()}")) for key, _ in some]
            latents = draw_latents(
                model,
                self._cond([prompt for _, prompt in some], sizes).to(self.device),
                self._cond([""] * len(some), sizes).to(self.device),
                torch.stack(noise).to(self.device),
                steps=draw.steps,
                guidance=draw.guidance,
            )
            for (key, prompt), mean in zip(some, latents, strict=True):
                store.add(str(bucket), key, {"mean": _cached(mean, prompt), "sizes": sizes})
            bar.update(len(some))
        store.flush()

    def index(self) -> Index:
        """Where everything is."""
        captions = self.stores["captions"]
        places = {
            group: [
                Entry(
                    _sort_key(key, caption),
                    self.stores[kind].location_in_cache(key),
                    captions.location_in_cache(caption),
                )
                for kind, key, caption in entries
            ]
            for group, entries in self.entries.items()
        }
        return Index.of(places, captions.location_in_cache(_caption_key("")), self.found)

    def _caption(self, caption: str) -> bytes:
        """The digest of a caption, which is encoded if it is new."""
        key = _caption_key(caption)
        if key not in self.stores["captions"]:
            self._captions[key] = caption
            if self.device.type == "cpu" or len(self._captions) >= _CAPTIONS:
                self._encode_captions()
        return key

    def _encode_captions(self) -> None:
        if not self._captions:
            return
        encoded = self.text_encoder.encode(list(self._captions.values()))
        for cond, (key, caption) in zip(encoded, self._captions.items(), strict=True):
            row = {name: _cached(tensor[0], caption) for name, tensor in cond.tensors.items()}
            self.stores["captions"].add(_caption_kind(row), key, row)
        self._captions.clear()

    @torch.no_grad()
    def _encode_pictures(self, bucket: Size) -> None:
        looks = self._pictures.pop(bucket)
        if not looks:
            return
        images = torch.stack([look.pixels for look in looks.values() if look.pixels is not None])
        encoded = self.autoencoder.encode(images.to(self.device))
        for row, (key, look) in enumerate(looks.items()):
            assert look.fit is not None
            name = look.sample.name
            tensors = {"mean": _cached(encoded.mean[row], name)}
            if encoded.std is not None:
                tensors["std"] = _cached(encoded.std[row], name)
            tensors["sizes"] = torch.tensor(look.fit.sizes, dtype=torch.int32)
            self.stores["latents"].add(str(bucket), key, tensors)

    def _cond(self, captions: list[str], sizes: torch.Tensor) -> Conditioning:
        """The conditioning of cached captions, for pictures that all have these sizes [6]."""
        store = self.stores["captions"]
        places = [store.locations[_caption_key(caption)] for caption in captions]
        rows = [caption_of(open_shard(store.folder / shard), row) for shard, row in places]
        return self.checkpoint.join(rows, sizes.expand(len(rows), -1))


def _caption_kind(row: Mapping[str, torch.Tensor]) -> str:
    """The kind of a caption's row: those of different shapes cannot be in one file."""
    return "captions" + "x".join(str(size) for name in sorted(row) for size in row[name].shape)


def _caption_key(caption: str) -> bytes:
    return digest(caption.encode())


def _sort_key(picture: bytes, caption: bytes) -> int:
    return int.from_bytes(digest(picture + caption)[:8], "big", signed=True)


def _cached(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """A row as it is cached.

    Raises UserError for one that is not finite, as SDXL's VAE gives them in float16.
    """
    row = tensor.to("cpu", CACHED_DTYPE) if tensor.is_floating_point() else tensor.cpu()
    if not row.isfinite().all():
        raise UserError(f"{name!r} is encoded to numbers that are not finite: use another VAE, or base.dtype float32")
    return row
