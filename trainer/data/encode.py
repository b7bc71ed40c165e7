"""Fill the cache: encode missing pictures with the VAE and missing captions with the text encoder.

For prompts without pictures, the teacher draws the missing latents.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from tqdm import tqdm

from ...tcd.distill.memory import memory_advice
from ...tcd.distill.teacher_sampling import dpm_solver_sample
from ...tcd.randomness import generator
from ..config.memory_advice import caching_advice
from ..config.settings import Config
from ..errors import UserError
from ..models import open_checkpoint
from ..models.conditioning import Conditioning
from ..models.framing import Framing
from ..models.seam import Autoencoder, Checkpoint, Model, TextEncoder
from .buckets import Size
from .cache import CachedData, Index, IndexEntry, cache_paths, cached_digest, merge_parts, open_cached
from .captions import caption_variants, with_prefix
from .dataset import Dataset, caption_of
from .sources import PictureSource, PromptFile, open_sources
from .store import Store, digest, open_shard
from .survey import (
    GroupKey,
    Inspection,
    Survey,
    check_bucket_sizes,
    configured_buckets,
    drawn_bucket,
    inspect_sample,
    parallel_map,
    raise_for_problems,
)

CACHED_DTYPE = torch.float16
"""Dtype of cached latents and embeddings.  float16 is eight times more precise than bfloat16 here, and most values are
far below its maximum.  An embedding above it, as of some large text encoders, is cached in float32."""
_PIXELS_PER_CALL, _CAPTIONS_PER_CALL = 8 * 512 * 512, 64
"""GPU batch limits for encoding: pixels (about 5 GiB in the VAE) and captions.  On a CPU each picture and caption is
encoded alone, so that a row has the same bits whichever other rows are missing.  A run that was killed while it filled
the cache therefore ends exactly like one that was not."""


Together = Callable[[Callable[[], Any]], Any]
"""Calls a function in one or all of several processes, and returns its result."""


def _alone(function: Callable[[], Any]) -> Any:
    return function()


def pictures_per_call(bucket: Size, device: torch.device) -> int:
    """Return how many pictures of a bucket are encoded or drawn in one call, at least 1."""
    return 1 if device.type == "cpu" else max(_PIXELS_PER_CALL // (bucket.height * bucket.width), 1)


def load_or_encode(
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    *,
    part: int = 0,
    parts: int = 1,
    total: int | None = None,
    on_main: Together = _alone,
    on_every: Together = _alone,
) -> Dataset:
    """Return the data of a configuration from the cache, after computing the missing rows on `device`.

    part, parts: this process computes part `part` of `parts`.
    total: the number of samples, for the progress bar.
    on_main, on_every: as the methods of `Processes`. The main process decides whether rows are missing, and what the
    data are.
    Raises UserError if a source or sample cannot be used, and MemoryFullError if memory runs out.
    """
    expected = on_main(lambda: cached_digest(config, dtype))
    if expected is None:
        on_every(lambda: fill_cache(config, device, dtype, part=part, parts=parts, total=total))
        on_main(lambda: merge_parts(config, dtype))
        expected = on_main(lambda: _open_complete(config, dtype).digest)
    dataset: Dataset = on_every(lambda: _open_complete(config, dtype, expected)).dataset
    return dataset


def _open_complete(config: Config, dtype: torch.dtype, expected: str | None = None) -> CachedData:
    """Open the data of a complete cache; raises UserError if it is not complete, or its digest is not `expected`."""
    cached = open_cached(config, dtype)
    if cached is None:
        raise UserError(
            f"{config.cache_folder} does not have all data after they were cached: they have changed meanwhile, or it "
            "is not the same folder for all processes; start again, with a data.cache that all of them reach"
        )
    if expected not in (None, cached.digest):
        raise UserError(
            f"{config.cache_folder} has other data for this process than for the main one: use a data.cache and data "
            "that are the same for all processes"
        )
    return cached


def fill_cache(
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    *,
    part: int = 0,
    parts: int = 1,
    total: int | None = None,
    verify: bool = False,
) -> None:
    """Compute all missing rows of one part of the data, and write its index.

    part, parts: every `parts`-th picture, tar file or prompt from `part` on.
    total: the number of samples, for the progress bar.
    verify: recompute files whose checksum does not match; return early if nothing is missing after that.
    If the process is killed, the next call continues with the rows that are still missing.
    Raises UserError if a source or sample cannot be used, and MemoryFullError if memory runs out.
    """
    checkpoint = open_checkpoint(config.base)
    check_bucket_sizes(config.data, checkpoint.latents)
    paths = cache_paths(config, checkpoint, dtype)
    stores = {kind: Store(paths.rows_folder(kind), verify=verify) for kind in paths.settings}
    if verify and open_cached(config, dtype):
        return
    filler = _CacheFiller(config, checkpoint, device, dtype, stores)
    bar = tqdm(total=total, desc="caching", unit="img", disable=part > 0)
    with bar, memory_advice(caching_advice(config, device, dtype)):
        for number, source in enumerate(open_sources(config.data)):
            if isinstance(source, PromptFile):
                filler.add_prompts(number, source, part, parts)
            else:
                filler.add_pictures(number, source, part, parts, bar)
        filler.finish_encoding()
        filler.draw_prompts(bar)
    raise_for_problems(filler.survey, config.data)
    if open_cached(config, dtype) is None:  # another process may have filled the cache meanwhile
        filler.index().write(paths.index_file(config, part, parts))


@dataclass
class _CacheFiller:
    """Collects the samples of one part of the data, and encodes those that are not cached, in batches."""

    config: Config
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    stores: dict[str, Store]
    survey: Survey = field(default_factory=Survey)
    entries: dict[GroupKey, list[tuple[str, bytes, list[bytes]]]] = field(default_factory=lambda: defaultdict(list))
    """For each picture of a group: store and digest of its latent, digests of the variants of its caption."""
    _pending_pictures: dict[Size, dict[bytes, Inspection]] = field(default_factory=lambda: defaultdict(dict))
    _pending_captions: dict[bytes, str] = field(default_factory=dict)
    _pending_drawings: dict[bytes, str] = field(default_factory=dict)
    """The prompts to draw, by the digest of the prompt and the drawing's number."""

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder, loaded when the first picture has to be encoded."""
        return self.checkpoint.load_autoencoder(self.device)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The text encoder, loaded when the first caption has to be encoded."""
        return self.checkpoint.load_text_encoder(self.device)

    def add_pictures(self, number: int, source: PictureSource, part: int, parts: int, bar: tqdm) -> None:
        """Add the samples of a source, and encode pictures and captions that are not cached."""
        store, buckets = self.stores["latents"], configured_buckets(self.config.data)
        inspections = parallel_map(
            lambda sample: inspect_sample(sample, buckets, is_cached=store.__contains__, pixels=True),
            source.samples(part, parts),
        )
        for inspection in inspections:
            sample = inspection.sample
            bar.update(not sample.left_out)
            self.survey.count(inspection)
            if inspection.problems or sample.left_out:
                continue
            bucket = inspection.crop.bucket if inspection.crop else Size.parse(store.kind(inspection.key))
            captions = self._add_captions(sample.caption)
            self.entries[GroupKey(number, sample.repeats, bucket)].append(("latents", inspection.key, captions))
            if inspection.crop and inspection.key not in store:
                self._pending_pictures[bucket][inspection.key] = inspection
            if len(self._pending_pictures[bucket]) >= pictures_per_call(bucket, self.device):
                self._encode_pictures(bucket)

    def add_prompts(self, number: int, source: PromptFile, part: int, parts: int) -> None:
        """Add the prompts of a file, encode new ones, and collect those that the teacher has to draw."""
        bucket, store = drawn_bucket(self.config.data), self.stores["drawn"]
        for line in source.captions()[part::parts]:
            prompt = with_prefix(line, self.config.data)
            for drawing in range(self.config.data.draw.per_prompt):
                key = digest(f"{drawing} {prompt}".encode())
                self.entries[GroupKey(number, 1, bucket)].append(("drawn", key, self._add_captions(line)))
                self.survey.seen += 1
                if key not in store:
                    self._add_caption(prompt)
                    self._pending_drawings[key] = prompt

    def finish_encoding(self) -> None:
        """Encode the last incomplete batches, write all rows to disk, and free the encoders."""
        for bucket in list(self._pending_pictures):
            self._encode_pictures(bucket)
        self._add_caption("")
        self._add_caption(self.config.method.negative_prompt)
        self._encode_captions()
        self.stores["latents"].flush()
        self.stores["captions"].flush()
        for encoder in ("autoencoder", "text_encoder"):
            self.__dict__.pop(encoder, None)

    def draw_prompts(self, bar: tqdm) -> None:
        """Let the teacher draw the latents that are not cached."""
        if not self._pending_drawings:
            return
        model: Model = self.checkpoint.load(self.dtype, self.device)
        bucket, draw, store = drawn_bucket(self.config.data), self.config.data.draw, self.stores["drawn"]
        prompts = list(self._pending_drawings.items())
        per_call = pictures_per_call(bucket, self.device)
        shape = self.checkpoint.latents.shape(*bucket)
        for start in range(0, len(prompts), per_call):
            batch = prompts[start : start + per_call]
            framing = Framing.whole(*bucket, len(batch))
            noise = [torch.randn(shape, generator=generator(0, f"drawing {key.hex()}")) for key, _ in batch]
            latents = dpm_solver_sample(
                model,
                self._cached_conditioning([prompt for _, prompt in batch], framing).to(self.device),
                self._cached_conditioning([self.config.method.negative_prompt] * len(batch), framing).to(self.device),
                torch.stack(noise).to(self.device),
                steps=draw.steps,
                guidance=draw.guidance,
            )
            for (key, prompt), mean, row in zip(batch, latents, framing.to_rows(), strict=True):
                store.add(str(bucket), key, {"mean": _latent_to_cached(mean, prompt), "sizes": row})
            bar.update(len(batch))
        store.flush()

    def index(self) -> Index:
        """Return the index of all added samples."""
        captions = self.stores["captions"]
        locations = {
            group: [
                IndexEntry(
                    _sort_key(key, b"".join(variants)),
                    [self.stores[kind].location_in_cache(key), *map(captions.location_in_cache, variants)],
                )
                for kind, key, variants in entries
            ]
            for group, entries in self.entries.items()
        }
        empty, negative = (
            captions.location_in_cache(_caption_digest(text)) for text in ("", self.config.method.negative_prompt)
        )
        return Index.from_entries(locations, empty, negative, self.survey)

    def _add_captions(self, caption: str) -> list[bytes]:
        return [self._add_caption(variant) for variant in caption_variants(caption, self.config.data)]

    def _add_caption(self, caption: str) -> bytes:
        """Return the digest of a caption; a caption that is not cached is encoded in `finish_encoding` or before."""
        key = _caption_digest(caption)
        if key not in self.stores["captions"]:
            self._pending_captions[key] = caption
            if self.device.type == "cpu" or len(self._pending_captions) >= _CAPTIONS_PER_CALL:
                self._encode_captions()
        return key

    def _encode_captions(self) -> None:
        if not self._pending_captions:
            return
        encoded = self.text_encoder.encode(list(self._pending_captions.values()))
        for cond, (key, caption) in zip(encoded, self._pending_captions.items(), strict=True):
            row = {name: _embedding_to_cached(tensor[0], caption) for name, tensor in cond.tensors.items()}
            self.stores["captions"].add(_caption_kind(row), key, row)
        self._pending_captions.clear()

    @torch.no_grad()
    def _encode_pictures(self, bucket: Size) -> None:
        inspections = self._pending_pictures.pop(bucket)
        if not inspections:
            return
        images = torch.stack([each.pixels for each in inspections.values() if each.pixels is not None])
        encoded = self.autoencoder.encode(images.to(self.device))
        for row, (key, inspection) in enumerate(inspections.items()):
            assert inspection.crop is not None
            name = inspection.sample.name
            tensors = {"mean": _latent_to_cached(encoded.mean[row], name)}
            if encoded.std is not None:
                tensors["std"] = _latent_to_cached(encoded.std[row], name)
            tensors["sizes"] = inspection.crop.framing.to_rows()[0]
            self.stores["latents"].add(str(bucket), key, tensors)

    def _cached_conditioning(self, captions: list[str], framing: Framing) -> Conditioning:
        """Return the conditioning of cached captions, one for each picture of `framing`."""
        store = self.stores["captions"]
        locations = [store.locations[_caption_digest(caption)] for caption in captions]
        rows = [caption_of(open_shard(store.folder / shard), row) for shard, row in locations]
        return self.checkpoint.collate(rows, framing)


def _caption_kind(row: Mapping[str, torch.Tensor]) -> str:
    """Return the kind of a caption's row, from its shapes and dtypes: rows that differ in them cannot share a shard."""
    sizes = "x".join(str(size) for name in sorted(row) for size in row[name].shape)
    wide = "".join(f"w{i}" for i, name in enumerate(sorted(row)) if row[name].dtype == torch.float32)
    return f"captions{sizes}{wide}"


def _caption_digest(caption: str) -> bytes:
    return digest(caption.encode())


def _sort_key(picture: bytes, caption: bytes) -> int:
    return int.from_bytes(digest(picture + caption)[:8], "big", signed=True)


def _latent_to_cached(latent: torch.Tensor, name: str) -> torch.Tensor:
    """Convert a latent to the dtype and device of the cache; raises UserError if a value is not finite there."""
    row = latent.to("cpu", CACHED_DTYPE)
    if not row.isfinite().all():
        raise UserError(f"{name!r} has a latent that is not finite in float16: use a different VAE in base.vae")
    return row


def _embedding_to_cached(tensor: torch.Tensor, caption: str) -> torch.Tensor:
    """Convert a tensor of an encoded caption to the device of the cache, and to float16, or float32 if it is larger.

    Raises UserError if a value is not finite.
    """
    if not tensor.is_floating_point():
        return tensor.cpu()
    if not tensor.isfinite().all():
        raise UserError(
            f"the caption {caption!r} has an encoding that is not finite: change its weights in brackets, or use other "
            "text encoders"
        )
    row = tensor.to("cpu", CACHED_DTYPE)
    return row if row.isfinite().all() else tensor.to("cpu", torch.float32)
