"""Find the cached latents and embeddings of a configuration, and open them as a `Dataset` once they are complete.

    CACHE/latents-HASH/   latents of pictures, by the digest of the image file
    CACHE/drawn-HASH/     latents drawn by the teacher, by the digest of the prompt and the drawing's number
    CACHE/captions-HASH/  text embeddings, by the digest of the caption
    CACHE/index-HASH.safetensors   the rows that belong to one data set; written last

A folder's HASH covers a fingerprint of the model and the settings that affect its rows. An index's HASH also covers the
source files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from ...tcd.files.atomic import atomic_write
from ..checked_file import open_checked, save_checked
from ..config.settings import Config
from ..errors import UserError
from ..models import open_checkpoint
from ..models.seam import Checkpoint
from .buckets import Size
from .dataset import Dataset, Table, caption_of
from .sources import open_sources
from .store import RowLocation, ShardFiles, open_shard
from .survey import GroupKey, Survey, make_groups

VERSION = 2
"""Version of the cached rows; increase it when the same input would produce different rows."""


@dataclass(frozen=True)
class CachePaths:
    """Paths of the row folders and of the index of one configuration."""

    folder: Path
    """The folder CACHE, which different configurations may share."""
    settings: Mapping[str, Mapping[str, Any]]
    """For each kind of row: every setting it depends on, apart from the content that its digest hashes."""

    def rows_folder(self, kind: str) -> Path:
        """Return the folder of one kind of row: "latents", "drawn" or "captions"."""
        return self.folder / f"{kind}-{_hash(self.settings[kind])}"

    def index_file(self, config: Config, part: int = 0, parts: int = 1) -> Path:
        """Return the path of the index of all data or of one part; it changes when a source file is modified."""
        part_of = f"-{part}of{parts}" if parts > 1 else ""
        return self.folder / f"index-{_index_hash(self, config)}{part_of}.safetensors"


def cache_paths(config: Config, checkpoint: Checkpoint, dtype: torch.dtype) -> CachePaths:
    """Return the cache paths of a configuration, with the network in `dtype`."""
    base, data, prints = config.base, config.data, checkpoint.fingerprints()
    autoencoder = {"version": VERSION, "model": prints.autoencoder or prints.base}
    captions = {"version": VERSION, "model": prints.text_encoders or prints.base, "clip_skip": base.clip_skip}
    buckets = {key: getattr(data, key) for key in ("resolution", "bucket_step", "buckets", "upscale")}
    guidance = {"captions": captions, "negative_prompt": config.method.negative_prompt}
    teacher = {"model": prints.base, "dtype": str(dtype), "prediction": base.prediction, "zero_snr": base.zero_snr}
    draw = {**asdict(data.draw), "per_prompt": None}  # a larger per_prompt adds rows and keeps the existing ones
    settings = {
        "latents": {**autoencoder, **buckets},
        "captions": captions,
        "drawn": {**teacher, **guidance, **draw, "resolution": data.resolution, "bucket_step": data.bucket_step},
    }
    return CachePaths(config.cache_folder, settings)


class GroupRows(NamedTuple):
    """The pictures of one source and bucket, in an order that depends only on their content."""

    keys: Tensor
    """[n] int64, ascending: a hash of each picture and its caption."""
    locations: Tensor
    """[n, 2 + 2 V] int32: shard and row of the latent and of each of V variants of the caption; shards are indices in
    `Index.shards`."""


@dataclass(frozen=True)
class Index:
    """The cached rows that belong to one data set."""

    shards: list[str]
    """Paths of the shards, relative to the cache folder."""
    groups: dict[GroupKey, GroupRows]
    """The pictures of each group."""
    empty: RowLocation
    """Location of the empty caption."""
    negative: RowLocation
    """Location of the negative prompt, which may be the empty caption."""
    survey: Survey
    """Counts of the samples and their problems."""

    @staticmethod
    def from_entries(
        entries: Mapping[GroupKey, Sequence[IndexEntry]],
        empty: RowLocation,
        negative: RowLocation,
        survey: Survey,
    ) -> Index:
        """Build an index from the locations of pictures and their captions."""
        locations = (each for group in entries.values() for entry in group for each in entry.locations)
        shards = {name: number for number, name in enumerate(dict.fromkeys(each.shard for each in locations))}
        groups = {}
        for which, group in entries.items():
            numbers = [[n for at in entry.locations for n in (shards[at.shard], at.row)] for entry in group]
            keys = torch.tensor([entry.key for entry in group])
            groups[which] = _sort_by_key(keys, torch.tensor(numbers, dtype=torch.int32))
        return Index(list(shards), groups, empty, negative, survey)

    def digest(self) -> str:
        """Return a hash of the picture and caption contents, their source and bucket, and their multiplicity."""
        content = hashlib.sha256()
        for key, rows in sorted(self.groups.items(), key=lambda group: group[0]):
            content.update(f"{key.source} {key.repeats} {key.bucket} {len(rows.keys)}\n".encode())
            content.update(rows.keys.numpy().data)
        return content.hexdigest()[:16]

    @staticmethod
    def merge(parts: Sequence[Index]) -> Index:
        """Join the indices of all parts of the data."""
        survey, shards = Survey(), list[str]()
        pieces: dict[GroupKey, list[GroupRows]] = defaultdict(list)
        for part in parts:
            for which, rows in part.groups.items():
                offset = torch.tensor([len(shards), 0], dtype=torch.int32).repeat(rows.locations.shape[1] // 2)
                pieces[which].append(GroupRows(rows.keys, rows.locations + offset))
            shards += part.shards
            survey.merge(part.survey)
        groups = {
            which: _sort_by_key(torch.cat([rows.keys for rows in each]), torch.cat([rows.locations for rows in each]))
            for which, each in pieces.items()
        }
        return Index(shards, groups, parts[0].empty, parts[0].negative, survey)

    def write(self, path: Path) -> None:
        """Write the index to a file, atomically."""
        tensors: dict[str, Tensor] = {}
        for number, rows in enumerate(self.groups.values()):
            tensors |= {f"{number}.keys": rows.keys, f"{number}.locations": rows.locations}
        header = {
            "shards": self.shards,
            "groups": [(key.source, key.repeats, *key.bucket) for key in self.groups],
            "empty": self.empty,
            "negative": self.negative,
            "seen": self.survey.seen,
            "problems": self.survey.problems,
            "notes": self.survey.notes,
            "names": self.survey.names,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            save_checked(tensors, temporary, {"index": json.dumps(header)})

    @staticmethod
    def read(path: Path) -> Index:
        """Read an index, memory-mapped.

        Raises OSError or SafetensorError if the file does not exist or is damaged.
        """
        tensors, metadata = open_checked(path, content=True)
        header = json.loads(metadata["index"])
        groups = {
            GroupKey(source, repeats, Size(*size)): GroupRows(tensors[f"{number}.keys"], tensors[f"{number}.locations"])
            for number, (source, repeats, *size) in enumerate(header["groups"])
        }
        survey = Survey(
            Counter({which: len(rows.keys) for which, rows in groups.items()}),
            header["seen"],
            Counter(header["problems"]),
            Counter(header["notes"]),
            header["names"],
        )
        empty, negative = (RowLocation(*header[name]) for name in ("empty", "negative"))
        return Index(header["shards"], groups, empty, negative, survey)


class IndexEntry(NamedTuple):
    """One picture of a data set, and the locations of its rows."""

    key: int
    """Sort key, int64: a hash of the picture and its caption."""
    locations: Sequence[RowLocation]
    """The latent, and each variant of the caption."""


@dataclass(frozen=True)
class CachedData:
    """The data of a configuration whose cache is complete."""

    dataset: Dataset
    survey: Survey
    digest: str
    """As `Index.digest`: the same for the same pictures and captions, wherever they are cached."""


def open_cached(config: Config, dtype: torch.dtype) -> CachedData | None:
    """Open the data of a configuration, or return None if the cache is not complete.

    The length of each file is checked, but not its content. A file that is too short counts as missing.
    Raises UserError if the cache is complete but contains no usable picture.
    """
    checkpoint = open_checkpoint(config.base)
    try:
        index = Index.read(cache_paths(config, checkpoint, dtype).index_file(config))
        paths = [config.cache_folder / name for name in index.shards]
        for path in paths:
            open_shard(path)
        empty, negative = (
            caption_of(open_shard(config.cache_folder / shard), row) for shard, row in (index.empty, index.negative)
        )
    except (SafetensorError, OSError):
        return None
    if not index.groups:
        raise UserError(index.survey.refusal())
    shards, ordered = ShardFiles(paths), sorted(index.groups.items(), key=lambda group: group[0])
    groups = make_groups(config.data, [(key, len(rows.keys)) for key, rows in ordered])
    tables = [Table(rows.locations, shards, shards) for _, rows in ordered]
    dataset = Dataset(groups, tables, empty, checkpoint.collate, negative)
    return CachedData(dataset, index.survey, index.digest())


def cached_digest(config: Config, dtype: torch.dtype) -> str | None:
    """Return the digest of the data of a configuration, or None if rows are missing; raises as `open_cached` does."""
    cached = open_cached(config, dtype)
    return None if cached is None else cached.digest


def input_fingerprints(config: Config, dtype: torch.dtype) -> dict[str, str]:
    """Return fingerprints of a run's inputs (base, its dtype, VAE and data), each of which changes with its input.

    There is no VAE entry if the base contains the VAE, and no data entry while the cache is incomplete.
    """
    checkpoint = open_checkpoint(config.base)
    model = checkpoint.fingerprints()
    prints = {"the base": model.base, "the base's dtype": str(dtype)}
    if model.autoencoder is not None:
        prints["the VAE"] = model.autoencoder
    try:
        index = Index.read(cache_paths(config, checkpoint, dtype).index_file(config))
    except (SafetensorError, OSError):
        return prints
    return prints | {"the data": f"{index.survey.pictures} captioned pictures, {index.digest()}"}


def merge_parts(config: Config, dtype: torch.dtype) -> None:
    """Write the index of all data if the cache is not complete yet and the indices of all parts exist."""
    paths = cache_paths(config, open_checkpoint(config.base), dtype)
    complete = paths.index_file(config)
    for first in sorted(paths.folder.glob(f"{complete.stem}-0of*.safetensors")):
        if open_cached(config, dtype):
            return
        parts = int(first.stem.rpartition("of")[2])
        files = [paths.index_file(config, part, parts) for part in range(parts)]
        if all(file.is_file() for file in files):
            Index.merge([Index.read(file) for file in files]).write(complete)


def _sort_by_key(keys: Tensor, locations: Tensor) -> GroupRows:
    order = keys.argsort(stable=True)
    return GroupRows(keys[order], locations[order].contiguous())


def _index_hash(paths: CachePaths, config: Config) -> str:
    """Return a hash of the rows' settings and of the name, size and modification time of every source file."""
    captions = [getattr(config.data, key) for key in ("caption_prefix", "shuffle_tags", "keep_tags")]
    state: list[Any] = [config.data.skip_bad, config.data.draw.per_prompt, captions, config.method.negative_prompt]
    state.append(paths.settings)
    for source in open_sources(config.data):
        state.append([type(source).__name__, *map(_file_state, source.files())])
    return _hash(state)


def _file_state(path: Path) -> tuple[str, int, int]:
    """Return the absolute path, size and modification time of a file; (path, 0, 0) for a broken link."""
    try:
        state = path.stat()
    except OSError:
        return os.path.abspath(path), 0, 0
    return os.path.abspath(path), state.st_size, state.st_mtime_ns


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=dict).encode()).hexdigest()[:16]
