"""The data as training reads it, on disk: which files belong to a configuration, and whether they are all there.

Flows in: a configuration.  Flows out: a `Dataset` on files that are mapped into memory, or None while some are missing.

    CACHE/latents-KEY/    latents of pictures, by the digest of their bytes; KEY is that of the model and the buckets
    CACHE/drawn-KEY/      latents that the teacher drew, by the digest of the prompt and the number of the drawing
    CACHE/captions-KEY/   text embeddings, by the digest of the caption
    CACHE/index-KEY.safetensors   which rows of those belong to which data; written when everything is there
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..atomic import atomic_write
from ..config.settings import Config
from ..errors import UserError
from ..models import open_checkpoint
from ..models.seam import Checkpoint
from .buckets import Size
from .dataset import Dataset, Table, caption_of
from .sources import open_sources
from .store import RowLocation, ShardFiles, open_shard
from .survey import Survey, make_groups

VERSION = 2
"""Version of the cached rows; increase it when the same input would produce different rows."""


@dataclass(frozen=True)
class Layout:
    """The folders of a configuration's rows, and the name of its index."""

    folder: Path
    settings: Mapping[str, Mapping[str, Any]]
    """For each kind of row: every setting it depends on, apart from the content that its digest hashes."""

    def store(self, kind: str) -> Path:
        """The folder of one kind of rows."""
        return self.folder / f"{kind}-{_key(self.settings[kind])}"

    def index(self, config: Config, part: int = 0, parts: int = 1) -> Path:
        """The index of the data, or of one part of several, as the files of the data are now."""
        part_of = f"-{part}of{parts}" if parts > 1 else ""
        return self.folder / f"index-{_fingerprint(self, config)}{part_of}.safetensors"


def layout(config: Config, checkpoint: Checkpoint, dtype: torch.dtype) -> Layout:
    """Where the rows of a configuration are, with text encoders and network in `dtype`."""
    base, data, prints = config.base, config.data, checkpoint.fingerprints()
    autoencoder = {"version": VERSION, "model": prints.get("the VAE", prints["the base"])}
    model = {"version": VERSION, "model": prints["the base"], "dtype": str(dtype)}
    buckets = {key: getattr(data, key) for key in ("resolution", "bucket_step", "buckets", "upscale")}
    teacher = {**model, "prediction": base.prediction, "zero_snr": base.zero_snr}
    draw = {**asdict(data.draw), "per_prompt": None}  # one more drawing of a prompt leaves the others as they are
    settings = {
        "latents": {**autoencoder, **buckets},
        "captions": model,
        "drawn": {**teacher, **draw, "resolution": data.resolution, "bucket_step": data.bucket_step},
    }
    return Layout(config.cache_folder, settings)


class Rows(NamedTuple):
    """The pictures of one source and bucket, in an order that depends on nothing but what they are."""

    keys: Tensor
    """[n] int64, ascending: of the digests of picture and caption."""
    places: Tensor
    """[n, 4] int32: the number of the latent's shard, its row there, and the same of the caption."""


@dataclass(frozen=True)
class Index:
    """Which rows belong to a data set."""

    shards: list[str]
    """Files, as paths from the cache's folder."""
    groups: dict[tuple[int, Size], Rows]
    """By source and bucket."""
    empty: RowLocation
    """The empty caption."""
    found: Survey

    @staticmethod
    def of(entries: Mapping[tuple[int, Size], Sequence[Entry]], empty: RowLocation, found: Survey) -> Index:
        """The index of pictures whose places are known."""
        places = (place for group in entries.values() for entry in group for place in (entry.latent, entry.caption))
        shards = {name: number for number, name in enumerate(dict.fromkeys(place.shard for place in places))}
        groups = {}
        for which, group in entries.items():
            numbers = [
                (shards[latent.shard], latent.row, shards[caption.shard], caption.row) for _, latent, caption in group
            ]
            keys = torch.tensor([entry.key for entry in group])
            groups[which] = _sorted(keys, torch.tensor(numbers, dtype=torch.int32))
        return Index(list(shards), groups, empty, found)

    def digest(self) -> str:
        """A name for the pictures and captions by their content, in which source and bucket they are, and how often."""
        content = hashlib.sha256()
        for (number, bucket), rows in sorted(self.groups.items()):
            content.update(f"{number} {bucket} {len(rows.keys)}\n".encode())
            content.update(rows.keys.numpy().data)
        return content.hexdigest()[:16]

    @staticmethod
    def merged(parts: Sequence[Index]) -> Index:
        """The index of several parts' data together."""
        found, shards = Survey(), list[str]()
        pieces: dict[tuple[int, Size], list[Rows]] = defaultdict(list)
        for part in parts:
            offset = torch.tensor([len(shards), 0, len(shards), 0], dtype=torch.int32)
            for which, rows in part.groups.items():
                pieces[which].append(Rows(rows.keys, rows.places + offset))
            shards += part.shards
            found.merge(part.found)
        groups = {
            which: _sorted(torch.cat([rows.keys for rows in each]), torch.cat([rows.places for rows in each]))
            for which, each in pieces.items()
        }
        return Index(shards, groups, parts[0].empty, found)

    def write(self, path: Path) -> None:
        """Write it whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for number, rows in enumerate(self.groups.values()):
            tensors |= {f"{number}.keys": rows.keys, f"{number}.places": rows.places}
        header = {
            "shards": self.shards,
            "groups": [(number, *bucket) for number, bucket in self.groups],
            "empty": self.empty,
            "found": self.found.seen,
            "problems": self.found.problems,
            "names": self.found.names,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as unfinished:
            save_file(tensors, unfinished, metadata={"index": json.dumps(header)})

    @staticmethod
    def read(path: Path) -> Index:
        """The index in a file, mapped into memory.

        Raises OSError or SafetensorError where there is none.
        """
        tensors = open_shard(path)
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["index"])
        groups = {
            (source, Size(height, width)): Rows(tensors[f"{number}.keys"], tensors[f"{number}.places"])
            for number, (source, height, width) in enumerate(header["groups"])
        }
        found = Survey(
            Counter({which: len(rows.keys) for which, rows in groups.items()}),
            header["found"],
            Counter(header["problems"]),
            header["names"],
        )
        return Index(header["shards"], groups, RowLocation(*header["empty"]), found)


class Entry(NamedTuple):
    """One picture of a data set."""

    key: int
    latent: RowLocation
    caption: RowLocation


@dataclass(frozen=True)
class Cached:
    """A complete cache."""

    dataset: Dataset
    found: Survey


def open_cached(config: Config, dtype: torch.dtype) -> Cached | None:
    """Open the rows of a configuration's data; None if they are not all in the cache.

    Every file's length is checked, none is read: files shorter than their header says count as missing.
    Raises UserError if the cache is complete but contains no usable picture.
    """
    checkpoint = open_checkpoint(config.base)
    try:
        index = Index.read(layout(config, checkpoint, dtype).index(config))
        paths = [config.cache_folder / name for name in index.shards]
        for path in paths:
            open_shard(path)
        shard, row = index.empty
        empty = caption_of(open_shard(config.cache_folder / shard), row)
    except (SafetensorError, OSError):
        return None
    if not index.groups:
        raise UserError(f"no picture is left to train on: {index.found.complaints()}")
    shards, ordered = ShardFiles(paths), sorted(index.groups.items())
    groups = make_groups(config.data, [(which, len(rows.keys)) for which, rows in ordered])
    tables = [Table(rows.places, shards, shards) for _, rows in ordered]
    return Cached(Dataset(groups, tables, empty, checkpoint.join), index.found)


def input_fingerprints(config: Config, dtype: torch.dtype) -> dict[str, str]:
    """Fingerprints of a run's inputs, the base, VAE and data; each changes when the content does.

    The data entry is absent until the cache is complete.
    """
    checkpoint = open_checkpoint(config.base)
    prints = dict(checkpoint.fingerprints())
    try:
        index = Index.read(layout(config, checkpoint, dtype).index(config))
    except (SafetensorError, OSError):
        return prints
    return prints | {"the data": f"{index.found.pictures} captioned pictures, {index.digest()}"}


def merge_parts(config: Config, dtype: torch.dtype) -> None:
    """Write the index of the whole data, unless it is complete, if those of all parts of it are there."""
    where = layout(config, open_checkpoint(config.base), dtype)
    whole = where.index(config)
    for first in sorted(where.folder.glob(f"{whole.stem}-0of*.safetensors")):
        if open_cached(config, dtype):
            return
        parts = int(first.stem.rpartition("of")[2])
        paths = [where.index(config, part, parts) for part in range(parts)]
        if all(path.is_file() for path in paths):
            Index.merged([Index.read(path) for path in paths]).write(whole)


def _sorted(keys: Tensor, places: Tensor) -> Rows:
    order = keys.argsort(stable=True)
    return Rows(keys[order], places[order].contiguous())


def _fingerprint(where: Layout, config: Config) -> str:
    """A name for the rows' settings and the state of all files that the data are read from."""
    state: list[Any] = [config.data.skip_bad, config.data.draw.per_prompt, where.settings]
    for source in open_sources(config.data):
        files = ((file, file.stat()) for file in source.files())
        state.append([type(source).__name__, *((f.name, str(f.parent), s.st_size, s.st_mtime_ns) for f, s in files)])
    return _key(state)


def _key(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=dict).encode()).hexdigest()[:16]
