"""Where captioned pictures come from: folders, folders with metadata.jsonl, tar shards, and prompts without pictures.

Flows in: the paths of a configuration.  Flows out: `Sample`s, one after the other, in an order that does not change.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from glob import glob, has_magic
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..config.settings import DataConfig
from ..errors import UserError
from .pictures import SUFFIXES

METADATA = "metadata.jsonl"
NO_CAPTION, NO_PICTURE = "have no caption", "have a caption but no picture"
NOT_UTF8 = "have a caption that is not UTF-8"
DAMAGED_TAR = "are tar files that end or break off early"


class Sample(NamedTuple):
    """A picture and its caption, or what is wrong with them."""

    name: str
    read: Callable[[], bytes]
    """Gives the bytes of the image file; raises OSError where it cannot be read."""
    caption: str = ""
    problem: str = ""
    """Why it cannot be used, as the end of a sentence about several; empty when nothing is wrong so far."""


@dataclass(frozen=True)
class Folder:
    """Images in a folder and those within it, each with a .txt of the same name beside it."""

    path: Path

    def files(self) -> list[Path]:
        """All files that its samples are read from, sorted."""
        return sorted(path for path in self._all() if path.suffix.lower() in SUFFIXES | {".txt"})

    def samples(self, part: int = 0, parts: int = 1) -> Iterator[Sample]:
        """Every picture, or every `parts`-th from `part` on, sorted by path."""
        for path in sorted(path for path in self._all() if path.suffix.lower() in SUFFIXES)[part::parts]:
            beside = path.with_suffix(".txt")
            text = beside.read_bytes() if beside.is_file() else None
            yield _sample(path.relative_to(self.path).as_posix(), path.read_bytes, text)

    def _all(self) -> Iterator[Path]:
        return (path for path in self.path.rglob("*") if not path.name.startswith(".") and path.is_file())


@dataclass(frozen=True)
class Listed:
    """Images in a folder that has a metadata.jsonl: a line for each, with `file_name` and `text`."""

    path: Path

    def files(self) -> list[Path]:
        """All files that its samples are read from, sorted."""
        return [*Folder(self.path).files(), self.path / METADATA]

    def samples(self, part: int = 0, parts: int = 1) -> Iterator[Sample]:
        """Every line's picture, and then every picture without a line; or every `parts`-th from `part` on.

        Raises UserError for a line that is not one.
        """
        lines = list(self._lines())
        listed = {name for name, _ in lines}
        rest = (sample.name for sample in Folder(self.path).samples() if sample.name not in listed)
        for name, text in [*lines, *((name, None) for name in rest)][part::parts]:
            yield _sample(name, (self.path / name).read_bytes, None if text is None else text.encode())

    def _lines(self) -> Iterator[tuple[str, str | None]]:
        path = self.path / METADATA
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                name, text = entry["file_name"], entry.get("text")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path}, line {number}: not an object with file_name and text ({error})") from error
            if not (isinstance(name, str) and isinstance(text, str | None)):
                raise UserError(f"{path}, line {number}: file_name and text must be texts")
            yield name, text


@dataclass(frozen=True)
class Shards:
    """Tar files as webdataset has them: files of one name up to its first dot, one after the other, are one sample."""

    pattern: str
    paths: tuple[Path, ...]

    def files(self) -> list[Path]:
        """The tar files, sorted."""
        return list(self.paths)

    def samples(self, part: int = 0, parts: int = 1) -> Iterator[Sample]:
        """Every sample of every shard, or of every `parts`-th from `part` on, read from front to back, nothing kept."""
        for path in self.paths[part::parts]:
            yield from _read_shard(path)


@dataclass(frozen=True)
class Prompts:
    """Captions alone, one a line: the teacher draws the pictures."""

    path: Path

    def files(self) -> list[Path]:
        """The text file."""
        return [self.path]

    def captions(self) -> list[str]:
        """Every line that is not blank.

        Raises UserError for a file that has none or is not UTF-8.
        """
        try:
            captions = [line.strip() for line in self.path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is not UTF-8 text: {error}") from error
        if not captions:
            raise UserError(f"{self.path} has no prompts in it: write one a line")
        return captions


PictureSource = Folder | Listed | Shards
Source = PictureSource | Prompts


def open_sources(data: DataConfig) -> list[Source]:
    """The sources of a configuration, each found to be there.

    Raises UserError, naming the key, for one that is not, or is of no known kind.
    """
    return [_open(key, source.path) for key, source in data.named_sources]


def _open(key: str, text: str) -> Source:
    path = Path(text).expanduser()
    if path.suffix == ".tar":
        return Shards(text, _tars(key, path))
    if path.suffix == ".txt" and path.is_file():
        return Prompts(path)
    if not path.is_dir():
        kinds = "a folder of pictures, .tar shards such as shards/*.tar, or a .txt file of prompts"
        raise UserError(f"there is no data folder at {path} ({key} may be {kinds})")
    source = Listed(path) if (path / METADATA).is_file() else Folder(path)
    if not any(file.suffix.lower() in SUFFIXES for file in source.files()):
        raise UserError(f"{path} ({key}) has no pictures in it: put {', '.join(sorted(SUFFIXES))} files there")
    return source


def _tars(key: str, path: Path) -> tuple[Path, ...]:
    found = sorted(map(Path, glob(str(path), recursive=True))) if has_magic(str(path)) else [path]
    if not found or not all(tar.is_file() for tar in found):
        raise UserError(f"{key} is {str(path)!r}, but no such .tar file is there")
    return tuple(found)


def _sample(name: str, read: Callable[[], bytes], text: bytes | None) -> Sample:
    """The sample of a picture and its caption file's bytes, None for none; one that says nothing is none, too."""
    try:
        caption = "" if text is None else text.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return Sample(name, read, problem=NOT_UTF8)
    return Sample(name, read, caption) if caption else Sample(name, read, problem=NO_CAPTION)


def _read_shard(path: Path) -> Iterator[Sample]:
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
            yield from _grouped(path, _members(tar))
            if not _ends(file):  # which tarfile takes for the end when it is between two files
                raise tarfile.ReadError
    except (tarfile.TarError, OSError):
        yield Sample(path.name, bytes, problem=DAMAGED_TAR)


def _ends(file: BinaryIO) -> bool:
    """Whether a tar file ends as one that was written to its end: with a block of zeros."""
    file.seek(-tarfile.BLOCKSIZE, os.SEEK_END)
    return file.read() == bytes(tarfile.BLOCKSIZE)


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    """The key, ending and bytes of each picture and caption."""
    for member in tar:
        tar.members.clear()  # type: ignore[attr-defined]  # which tarfile keeps for going back
        folder, slash, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        suffix = f".{ending.lower()}"
        file = tar.extractfile(member) if stem and suffix in SUFFIXES | {".txt"} else None
        if file is not None:
            yield folder + slash + stem, suffix, file.read()


def _grouped(path: Path, members: Iterable[tuple[str, str, bytes]]) -> Iterator[Sample]:
    key, held = "", dict[str, bytes]()
    for at, suffix, data in members:
        if at != key:
            yield from _finish(path, key, held)
            key, held = at, {}
        held[suffix] = data
    yield from _finish(path, key, held)


def _finish(path: Path, key: str, held: dict[str, bytes]) -> Iterator[Sample]:
    """The sample of what one key has in a shard: its first picture, and its caption."""
    text = held.pop(".txt", None)
    for suffix, data in held.items():
        yield _sample(f"{path.name}/{key}{suffix}", partial(bytes, data), text)
        return
    if text is not None:
        yield Sample(f"{path.name}/{key}.txt", bytes, problem=NO_PICTURE)
