"""Store rows of tensors in safetensors files, and find each row by a digest of the input it was computed from.

Files (shards) have up to about 256 MiB, are written atomically, and are memory-mapped when read.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from ...tcd.files.atomic import atomic_write, remove_unfinished
from ..checked_file import open_checked, save_checked

DIGESTS = "digest"
"""Name of the tensor in a shard that holds the digests of its rows, uint8 [n, 16]."""
SHARD_BYTES = 256 * 2**20
SHARD_SECONDS = 300.0
"""Added rows are written when they reach SHARD_BYTES, or SHARD_SECONDS after the last write."""
log = logging.getLogger("trajectory-consistency")


def digest(data: bytes) -> bytes:
    """Return the first 16 bytes of the SHA-256 of `data`."""
    return hashlib.sha256(data).digest()[:16]


class RowLocation(NamedTuple):
    """The shard that contains a row, and the row's index in it."""

    shard: str
    """File name, relative to the store's folder or, from `Store.location_in_cache`, to its parent."""
    row: int

    @property
    def kind(self) -> str:
        """The kind of the rows in the shard, from its file name."""
        return self.shard.split("-")[-2]


class Store:
    """The rows in one folder, by digest; added rows are on disk after `flush` at the latest.

    Each row has a kind.  All rows of a kind have the same tensor names and shapes, and share shards.
    """

    def __init__(self, folder: Path, *, verify: bool = False) -> None:
        """List the rows that the folder already contains; several processes may add rows to it at the same time.

        Damaged files are removed, so that their rows are computed again.  A file is damaged if its length or a checksum
        does not match; that of the content is compared only with `verify`.
        """
        self.folder = folder
        self.locations: dict[bytes, RowLocation] = {}
        self._pending: dict[str, dict[bytes, Mapping[str, Tensor]]] = defaultdict(dict)
        self._kinds: dict[bytes, str] = {}
        self._bytes, self._written = 0, monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        for path in sorted(folder.glob("[!.]*.safetensors")):
            self._add_shard(path, verify)

    def __contains__(self, key: bytes) -> bool:
        return key in self.locations or key in self._kinds

    def kind(self, key: bytes) -> str:
        """Return the kind of a stored or added row."""
        return self.locations[key].kind if key in self.locations else self._kinds[key]

    def location_in_cache(self, key: bytes) -> RowLocation:
        """Return the location of a flushed row, with the shard relative to the store's parent folder."""
        shard, row = self.locations[key]
        return RowLocation(f"{self.folder.name}/{shard}", row)

    def add(self, kind: str, key: bytes, row: Mapping[str, Tensor]) -> None:
        """Add a row under the digest of its input; it is written once enough rows are waiting."""
        self._pending[kind][key] = row
        self._kinds[key] = kind
        self._bytes += sum(tensor.nbytes for tensor in row.values())
        if self._bytes >= SHARD_BYTES:
            self._write(max(self._pending, key=lambda kind: len(self._pending[kind])))
        elif monotonic() - self._written > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write all added rows to disk."""
        for kind in list(self._pending):
            self._write(kind)
        self._written = monotonic()

    def _write(self, kind: str) -> None:
        rows = self._pending.pop(kind)
        keys, first = list(rows), next(iter(rows.values()))
        tensors = {name: torch.stack([row[name] for row in rows.values()]).contiguous() for name in first}
        tensors[DIGESTS] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 16)
        # Named after its rows, so that two processes never write different rows under the same name.
        path = self.folder / f"{kind}-{digest(b''.join(keys)).hex()}.safetensors"
        with atomic_write(path, by_content=True) as temporary:
            save_checked(tensors, temporary)
        for row, key in enumerate(keys):
            self.locations[key] = RowLocation(path.name, row)
            self._kinds.pop(key)
        self._bytes -= sum(tensor.nbytes for name, tensor in tensors.items() if name != DIGESTS)

    def _add_shard(self, path: Path, verify: bool) -> None:
        try:
            tensors, _ = open_checked(path, content=verify)
        except (SafetensorError, OSError) as error:
            _remove_damaged(path, str(error))
            return
        keys = tensors[DIGESTS].numpy().tobytes()
        self.locations |= {keys[at : at + 16]: RowLocation(path.name, at // 16) for at in range(0, len(keys), 16)}


class ShardFiles(Sequence[Mapping[str, Tensor]]):
    """A sequence of shards that are opened on access; their rows are read from disk when used."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> Mapping[str, Tensor]:  # type: ignore[override]
        return _open_shard_cached(self._paths[number])

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        return map(_open_shard_cached, self._paths)


def open_shard(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a shard, memory-mapped, so that only the rows in use are read.

    Raises OSError if the file cannot be read or its header is damaged, and SafetensorError if its format or length is
    wrong.
    """
    return open_checked(path, content=False)[0]


@lru_cache(maxsize=64)  # far below the limit on open files of a process
def _open_shard_cached(path: Path) -> dict[str, Tensor]:
    return open_shard(path)


def _remove_damaged(path: Path, reason: str) -> None:
    log.warning("%s is damaged (%s): removed, its rows are computed again", path, reason)
    path.unlink(missing_ok=True)
