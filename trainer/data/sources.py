"""Sources of samples: folders of captioned pictures, folders with metadata.jsonl, tar shards, and files of prompts.

Each source yields its samples in a fixed order, so that processes can divide them by index.
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
"""Name of the file that lists a folder's pictures and their captions."""
NO_CAPTION, NO_PICTURE = "have no caption", "have a caption but no picture"
NOT_UTF8 = "have a caption that is not UTF-8"
DAMAGED_TAR = "are tar files that end or break off early"
"""Problems of samples; each completes a message "3 of 9 pictures ..."."""


class Sample(NamedTuple):
    """A picture and its caption, or the problem with them."""

    name: str
    """The sample's name in messages."""
    read: Callable[[], bytes]
    """Returns the bytes of the image file; raises OSError if it cannot be read."""
    caption: str = ""
    """The caption without surrounding blanks; empty if there is a problem."""
    problem: str = ""
    """Why the sample cannot be used, such as NO_CAPTION; empty if no problem is known before the picture is read."""


@dataclass(frozen=True)
class CaptionedFolder:
    """Images in a folder and its subfolders, each with a caption in a .txt file of the same name."""

    path: Path

    def files(self) -> list[Path]:
        """Return the paths of all images and captions, sorted."""
        return sorted(path for path in self._visible_files() if path.suffix.lower() in SUFFIXES | {".txt"})

    def samples(self, part: int = 0, parts: int = 1) -> Iterator[Sample]:
        """Yield every `parts`-th picture from `part` on, sorted by path."""
        for path in sorted(path for path in self._visible_files() if path.suffix.lower() in SUFFIXES)[part::parts]:
            caption_path = path.with_suffix(".txt")
            text = caption_path.read_bytes() if caption_path.is_file() else None
            yield _make_sample(path.relative_to(self.path).as_posix(), path.read_bytes, text)

    def _visible_files(self) -> Iterator[Path]:
        return (path for path in self.path.rglob("*") if not path.name.startswith(".") and path.is_file())


@dataclass(frozen=True)
class MetadataFolder:
    """Images in a folder whose metadata.jsonl has a line for each image, with `file_name` and `text`."""

    path: Path

    def files(self) -> list[Path]:
        """Return the paths of all images and .txt files, sorted, and of metadata.jsonl."""
        return [*CaptionedFolder(self.path).files(), self.path / METADATA]

    def samples(self, part: int = 0, parts: int = 1) -> Iterator[Sample]:
        """Yield the listed pictures, then the unlisted ones, which have no caption; every `parts`-th from `part` on.

        Raises UserError if a line is not an object with file_name and text.
        """
        lines = list(self._parse_metadata())
        listed = {name for name, _ in lines}
        rest = (sample.name for sample in CaptionedFolder(self.path).samples() if sample.name not in listed)
        for name, text in [*lines, *((name, None) for name in rest)][part::parts]:
            yield _make_sample(name, (self.path / name).read_bytes, None if text is None else text.encode())

    def _parse_metadata(self) -> Iterator[tuple[str, str | None]]:
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
                raise UserError(f"{path}, line {number}: file_name and text must be strings")
            yield name, text


@dataclass(frozen=True)
class TarShards:
    """Tar files in the webdataset format: consecutive files whose names agree up to the first dot form one sample."""

    pattern: str
    """The path as configured, which may contain wildcards."""
    paths: tuple[Path, ...]

    def files(self) -> list[Path]:
        """Return the paths of the tar files, sorted."""
        return list(self.paths)

    def samples(self, part: int = 0, parts: int = 1) -> Iterator[Sample]:
        """Yield the samples of every `parts`-th tar file from `part` on, each file read sequentially."""
        for path in self.paths[part::parts]:
            yield from _read_tar(path)


@dataclass(frozen=True)
class PromptFile:
    """A text file with one prompt per line, for which the teacher draws the pictures."""

    path: Path

    def files(self) -> list[Path]:
        """Return the path of the text file."""
        return [self.path]

    def captions(self) -> list[str]:
        """Return all lines that are not blank.

        Raises UserError if there is none or the file is not UTF-8.
        """
        try:
            captions = [line.strip() for line in self.path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is not UTF-8 text: {error}") from error
        if not captions:
            raise UserError(f"{self.path} has no prompts in it: write one a line")
        return captions


PictureSource = CaptionedFolder | MetadataFolder | TarShards
Source = PictureSource | PromptFile


def open_sources(data: DataConfig) -> list[Source]:
    """Return the sources of a configuration.

    Raises UserError, naming the configuration key, if a source does not exist, is empty or is of no known kind.
    """
    return [_open_source(key, source.path) for key, source in data.named_sources]


def _open_source(key: str, text: str) -> Source:
    path = Path(text).expanduser()
    if path.suffix == ".tar":
        return TarShards(text, _find_tars(key, path))
    if path.suffix == ".txt" and path.is_file():
        return PromptFile(path)
    if not path.is_dir():
        kinds = "a folder of pictures, .tar shards such as shards/*.tar, or a .txt file of prompts"
        raise UserError(f"there is no data folder at {path} ({key} may be {kinds})")
    source = MetadataFolder(path) if (path / METADATA).is_file() else CaptionedFolder(path)
    if not any(file.suffix.lower() in SUFFIXES for file in source.files()):
        raise UserError(f"{path} ({key}) has no pictures in it: put {', '.join(sorted(SUFFIXES))} files there")
    return source


def _find_tars(key: str, path: Path) -> tuple[Path, ...]:
    found = sorted(map(Path, glob(str(path), recursive=True))) if has_magic(str(path)) else [path]
    if not found or not all(tar.is_file() for tar in found):
        raise UserError(f"{key} is {str(path)!r}, but no such .tar file is there")
    return tuple(found)


def _make_sample(name: str, read: Callable[[], bytes], text: bytes | None) -> Sample:
    """Make a sample from a picture and the bytes of its caption, None if missing; a blank caption counts as missing."""
    try:
        caption = "" if text is None else text.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return Sample(name, read, problem=NOT_UTF8)
    return Sample(name, read, caption) if caption else Sample(name, read, problem=NO_CAPTION)


def _read_tar(path: Path) -> Iterator[Sample]:
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
            yield from _group_members(path, _read_members(tar))
            if not _is_complete(file):  # tarfile does not notice that a file ends between two members
                raise tarfile.ReadError
    except (tarfile.TarError, OSError):
        yield Sample(path.name, bytes, problem=DAMAGED_TAR)


def _is_complete(file: BinaryIO) -> bool:
    """Return whether a tar file ends with a block of zeros, as every complete one does."""
    file.seek(-tarfile.BLOCKSIZE, os.SEEK_END)
    return file.read() == bytes(tarfile.BLOCKSIZE)


def _read_members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    """Yield (key, lower-case suffix, bytes) of each picture and caption; the key is the name up to its first dot."""
    for member in tar:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all members otherwise
        folder, slash, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        suffix = f".{ending.lower()}"
        file = tar.extractfile(member) if stem and suffix in SUFFIXES | {".txt"} else None
        if file is not None:
            yield folder + slash + stem, suffix, file.read()


def _group_members(path: Path, members: Iterable[tuple[str, str, bytes]]) -> Iterator[Sample]:
    """Yield a sample for each run of consecutive members with the same key."""
    current, data_by_suffix = "", dict[str, bytes]()
    for key, suffix, data in members:
        if key != current:
            yield from _samples_of_key(path, current, data_by_suffix)
            current, data_by_suffix = key, {}
        data_by_suffix[suffix] = data
    yield from _samples_of_key(path, current, data_by_suffix)


def _samples_of_key(path: Path, key: str, data_by_suffix: dict[str, bytes]) -> Iterator[Sample]:
    """Yield the sample of one key: its first picture and its caption; nothing if it has neither."""
    text = data_by_suffix.pop(".txt", None)
    for suffix, data in data_by_suffix.items():
        yield _make_sample(f"{path.name}/{key}{suffix}", partial(bytes, data), text)
        return
    if text is not None:
        yield Sample(f"{path.name}/{key}.txt", bytes, problem=NO_PICTURE)
