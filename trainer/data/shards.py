"""Tar files of captioned pictures, as in the webdataset format."""

from __future__ import annotations

import gzip
import posixpath
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from glob import escape, glob
from pathlib import Path
from typing import BinaryIO, cast

from ..errors import UserError
from .listing import HIDDEN, kind_of, sort_files
from .samples import Sample, make_sample

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
DAMAGED_TAR = "are tar files that end or break off early"
LINK = "are links, which are not followed in tar files"
"""Problems of samples; each completes a message "3 of 9 pictures ..."."""
_DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, zlib.error)


@dataclass(frozen=True)
class TarShards:
    """Tar files, each of which holds pictures and their captions; a picture and its caption are in the same file."""

    paths: tuple[Path, ...]

    def files(self) -> list[Path]:
        """Return the paths of the tar files, sorted."""
        return list(self.paths)

    def samples(self, part: int = 0, parts: int = 1) -> Iterator[Sample]:
        """Yield the samples of every `parts`-th tar file from `part` on, each file read sequentially."""
        for path in self.paths[part::parts]:
            for sample in _read_shard(path):
                yield sample._replace(name=f"{path.name}/{sample.name}" if sample.name else path.name)


def open_shards(key: str, path: Path) -> TarShards:
    """Return the shards of a path that may contain `*`, `?`, `[0-9]` and `{000..012}`.

    What exists under the name as written is not taken for a pattern.  Raises UserError, naming the configuration key,
    if a tar file is missing.
    """
    there = next((each for each in (path, *path.parents) if each.exists()), Path(path.anchor))
    found: set[Path] = set()
    for name in _expand_range(path.relative_to(there).as_posix()):
        tars = {Path(tar) for tar in glob(str(Path(escape(str(there)), name)), recursive=True)}
        if not tars or not all(tar.is_file() for tar in tars):
            raise UserError(f"{key} is {str(path)!r}, but no such .tar file is there: {there / name}")
        found |= tars
    return TarShards(tuple(sorted(found)))


def _expand_range(pattern: str) -> Iterator[str]:
    """Yield `s-008`, `s-009` and `s-010` for `s-{008..010}`."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        yield pattern
        return
    width, (low, high) = len(match[1]), sorted(map(int, match.groups()))
    for number in range(low, high + 1):
        yield from _expand_range(f"{pattern[: match.start()]}{number:0{width}d}{pattern[match.end() :]}")


def _read_shard(path: Path) -> Iterator[Sample]:
    """Yield the samples of a tar file, which is read twice: for the names and captions, then for the pictures."""
    names, texts = [], dict[str, bytes]()
    try:
        for name, data, is_link in _members(path, lambda name: kind_of(name) == "caption"):
            if is_link and kind_of(name) != HIDDEN:
                yield Sample(name, bytes, problem=LINK)
                continue
            names.append(name)
            if data is not None:
                texts[name] = data
    except _DAMAGE:
        pass  # reported below, after the samples in front of the damage
    captions = dict[str, bytes | None]()
    for entry in sort_files(names):
        if entry.note or entry.problem:
            yield Sample(entry.name, bytes, problem=entry.problem, note=entry.note, left_out=bool(entry.note))
        else:
            captions[entry.name] = texts[entry.caption] if entry.caption else None
    try:
        for name, data, _ in _members(path, captions.__contains__):
            if data is not None:
                yield make_sample(name, partial(bytes, data), captions[name])
    except _DAMAGE:
        yield Sample("", bytes, problem=DAMAGED_TAR)


def _members(path: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes | None, bool]]:
    """Yield (name, bytes, whether it is a link) of each file in a tar file; None for the bytes that are not wanted.

    Raises one of _DAMAGE if the file is damaged.
    """
    with _open(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all members otherwise
            name = posixpath.normpath(member.name)
            if member.issym() or member.islnk():
                yield name, None, True
            elif member.isreg():
                yield name, _read_member(tar, member) if is_wanted(name) else None, False
        file.seek(tar.offset)  # tarfile does not notice that a file ends between two members
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("there is no end-of-archive block")
        while file.read(2**20):  # the checksum of a compressed file is at its end
            pass


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Read a regular file in blocks, because a damaged header may claim any size."""
    file = tar.extractfile(member)
    assert file is not None
    return b"".join(iter(partial(file.read, 2**20), b""))


def _open(path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path)) if compressed else open(path, "rb")
