"""Rows of tensors on disk, each under the digest of what it was computed from, in files that are whole or not there.

Flows in: rows.  Flows out: safetensors files of some hundred MB, and from them the rows again, read where they lie.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from time import monotonic, time
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..atomic import atomic_write

DIGESTS = "digest"
"""The name of the tensor of a shard that holds the digests of its rows, uint8 [n, 16]."""
SHARD_BYTES = 256 * 2**20
SHARD_SECONDS = 300.0
"""Rows are written when there are that many bytes of them, or after that time, whichever is first."""
_ABANDONED_SECONDS = 3600.0
log = logging.getLogger("trajectory-consistency")


def digest(data: bytes) -> bytes:
    """The name of data by its content: 16 bytes of its SHA-256."""
    return hashlib.sha256(data).digest()[:16]


class Place(NamedTuple):
    """Where a row is."""

    shard: str
    """The file's name in the store's folder."""
    row: int

    @property
    def kind(self) -> str:
        """The kind of the rows in the file."""
        return self.shard.split("-")[-2]


class Store:
    """The rows in one folder, by digest; those added are on the disk after `flush`, or earlier."""

    def __init__(self, folder: Path, *, thorough: bool = False) -> None:
        """Find the rows that are in the folder already; several processes may add to it at once.

        A file that is damaged is removed, so that its rows are computed anew: one that is not as long as it says, or,
        when `thorough`, does not have the checksum it says.
        """
        self.folder = folder
        self.places: dict[bytes, Place] = {}
        self._pending: dict[str, dict[bytes, Mapping[str, Tensor]]] = defaultdict(dict)
        self._kinds: dict[bytes, str] = {}
        self._bytes, self._written = 0, monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.safetensors")):
            if path.name.startswith("."):
                _clear(path)
            else:
                self._add_shard(path, thorough)

    def __contains__(self, key: bytes) -> bool:
        return key in self.places or key in self._kinds

    def kind(self, key: bytes) -> str:
        """The kind of a row that is here."""
        return self.places[key].kind if key in self.places else self._kinds[key]

    def path_of(self, key: bytes) -> Place:
        """Where a row is that was flushed, as a path from the folder that the store's folder is in."""
        shard, row = self.places[key]
        return Place(f"{self.folder.name}/{shard}", row)

    def add(self, kind: str, key: bytes, row: Mapping[str, Tensor]) -> None:
        """Keep a row under its digest, in a file of its kind: all rows of a kind have the same names and shapes."""
        self._pending[kind][key] = row
        self._kinds[key] = kind
        self._bytes += sum(tensor.nbytes for tensor in row.values())
        if self._bytes >= SHARD_BYTES:
            self._write(max(self._pending, key=lambda kind: len(self._pending[kind])))
        elif monotonic() - self._written > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was added."""
        for kind in list(self._pending):
            self._write(kind)
        self._written = monotonic()

    def _write(self, kind: str) -> None:
        rows = self._pending.pop(kind)
        keys, first = list(rows), next(iter(rows.values()))
        tensors = {name: torch.stack([row[name] for row in rows.values()]).contiguous() for name in first}
        tensors[DIGESTS] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 16)
        # Named by its rows, so that another process that writes into the folder cannot have the name for other rows.
        path = self.folder / f"{kind}-{digest(b''.join(keys)).hex()}.safetensors"
        with atomic_write(path) as unfinished:
            save_file(tensors, unfinished, metadata={"crc32": _checksum(tensors)})
        for row, key in enumerate(keys):
            self.places[key] = Place(path.name, row)
            self._kinds.pop(key)
        self._bytes -= sum(tensor.nbytes for name, tensor in tensors.items() if name != DIGESTS)

    def _add_shard(self, path: Path, thorough: bool) -> None:
        try:
            tensors = open_shard(path)
            with safe_open(path, "pt") as file:
                expected = (file.metadata() or {}).get("crc32")
        except (SafetensorError, OSError) as error:
            _drop(path, str(error))
            return
        if expected is None or (thorough and _checksum(tensors) != expected):
            _drop(path, "its checksum is another")
            return
        keys = tensors[DIGESTS].numpy().tobytes()
        places = ((keys[at : at + 16], Place(path.name, at // 16)) for at in range(0, len(keys), 16))
        self.places.update(places)


class ShardFiles(Sequence[Mapping[str, Tensor]]):
    """Shards that are opened when they are asked for, and whose rows are read when they are used."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> Mapping[str, Tensor]:  # type: ignore[override]
        return _open_recent(self._paths[number])

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        return map(_open_recent, self._paths)


def open_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory: only what is used of them is read.

    Raises SafetensorError when the file is not as long as it says, or not of this format.
    """
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)


@lru_cache(maxsize=64)  # far fewer than the files that a process may have open
def _open_recent(path: Path) -> dict[str, Tensor]:
    return open_shard(path)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _clear(unfinished: Path) -> None:
    """Remove what a process that was killed left; of one that is still at work it is younger."""
    if time() - unfinished.stat().st_mtime > _ABANDONED_SECONDS:
        unfinished.unlink(missing_ok=True)


def _drop(path: Path, reason: str) -> None:
    log.warning("%s is damaged (%s): removed, its rows are computed anew", path, reason)
    path.unlink(missing_ok=True)
