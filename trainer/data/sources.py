"""Sources of samples: folders of captioned pictures, tar shards, and files of prompts.

Each source yields its samples in a fixed order, so that processes can divide them by index.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from ..config.data import DataConfig
from ..errors import UserError
from ..user_path import user_path
from .listing import HIDDEN, OTHER, UNREAD, Entry, kind_of, sort_files
from .metadata_files import METADATA_NAMES, listed_captions
from .pictures import SUFFIXES
from .samples import MAX_CAPTION, Sample, make_sample
from .shards import SHARD_SUFFIXES, TarShards, open_shards

UNREADABLE_CAPTION = "have a caption that cannot be read"
"""A problem of samples; it completes a message "3 of 9 pictures ..."."""
READ_ALREADY = "folders that are read under another name, because of links"
NO_REPEATS = "in a folder 0_name, which is shown 0 times"
"""Reasons why files are left out; each completes a message "...: 3 (a.png, b.png, c.png)"."""


@dataclass(frozen=True)
class PictureFolder:
    """Images in a folder and its subfolders, each with a caption file of the same name or listed in a metadata file.

    Links to folders are followed, and each folder is read once.  The number of a subfolder such as `10_name` says how
    often an epoch shows its pictures.
    """

    path: Path

    def files(self) -> list[Path]:
        """Return the paths of all pictures, captions and metadata files, sorted."""
        names, _ = self._found
        used = (name for name in names if name in self._metadata or kind_of(name) not in (HIDDEN, OTHER))
        return [self.path / name for name in sorted({*used, *self._listed})]

    def check(self, key: str) -> None:
        """Raise UserError, naming the configuration key, if there is no picture in the folder, or for its metadata."""
        kinds = Counter(map(kind_of, self._found[0]))
        if self._listed or kinds["picture"] or kinds[UNREAD]:
            return
        others = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        raise UserError(
            f"{self.path} ({key}) has no pictures in it: put {', '.join(sorted(SUFFIXES))} files there"
            + (f" (its files are: {others})" if others else "")
        )

    def samples(self, part: int = 0, parts: int = 1) -> Iterator[Sample]:
        """Yield every `parts`-th picture or file that is left out from `part` on, sorted by path.

        Raises UserError if a metadata file is not valid.
        """
        names, folders = self._found
        listed = {name for name, captions in self._listed.items() if captions}
        entries = sort_files({*names, *self._listed} - set(self._metadata), listed)
        for entry in [*entries, *folders][part::parts]:
            yield from self._samples_of(entry)

    @cached_property
    def _found(self) -> tuple[list[str], list[Entry]]:
        """The names of all files, and entries for the folders that are not read."""
        names, left_out, seen = [], [], {os.path.realpath(self.path)}

        def relative(folder: str, name: str = "") -> str:
            return (Path(folder) / name).relative_to(self.path).as_posix()

        def complain(error: OSError) -> None:
            left_out.append(Entry(relative(str(error.filename))))

        for folder, folders, files in os.walk(self.path, followlinks=True, onerror=complain):
            names += [relative(folder, name) for name in files]
            paths = {name: os.path.realpath(os.path.join(folder, name)) for name in folders}
            # Folders come before the links to them, so that a folder has its own name if it can.
            folders.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
            for name in list(folders):
                if paths[name] in seen:
                    left_out.append(Entry(relative(folder, name), note=READ_ALREADY))
                    folders.remove(name)
                seen.add(paths[name])
        return names, left_out

    @cached_property
    def _metadata(self) -> list[str]:
        return sorted(name for name in self._found[0] if _is_metadata(name))

    @cached_property
    def _listed(self) -> dict[str, list[str]]:
        """The captions of each picture that a metadata file lists."""
        return listed_captions(self.path, self._metadata, self._found[0])

    def _samples_of(self, entry: Entry) -> Iterator[Sample]:
        path, name, repeats = self.path / entry.name, entry.name, _folder_repeats(entry.name)
        read = partial(_read_file, path)
        if entry.note == OTHER and not path.exists():  # a broken link
            yield Sample(name, read)
        elif entry.note or entry.problem:
            yield Sample(name, bytes, problem=entry.problem, note=entry.note, left_out=bool(entry.note))
        elif not repeats:
            yield Sample(name, bytes, note=NO_REPEATS, left_out=True)
        elif captions := self._listed.get(name):
            for caption in captions:
                yield make_sample(name, read, caption.encode(), repeats)
        else:
            try:
                text = _read_file(self.path / entry.caption) if entry.caption else None
            except OSError:
                yield Sample(name, read, problem=UNREADABLE_CAPTION)
            else:
                yield make_sample(name, read, text, repeats)


@dataclass(frozen=True)
class PromptFile:
    """A text file with one prompt per line, for which the teacher draws the pictures."""

    path: Path

    def files(self) -> list[Path]:
        """Return the path of the text file."""
        return [self.path]

    def captions(self) -> list[str]:
        """Return all lines that are not blank.

        Raises UserError if there is none, one is longer than MAX_CAPTION, or the file is not UTF-8.
        """
        try:
            captions = [line.strip() for line in self.path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is not UTF-8 text: {error}") from error
        if not captions:
            raise UserError(f"{self.path} has no prompts in it: write one a line")
        longest = max(captions, key=len)
        if len(longest) > MAX_CAPTION:
            raise UserError(
                f"{self.path} has a prompt of {len(longest)} characters, {longest[:40]!r} ...: "
                f"write at most {MAX_CAPTION}"
            )
        return captions


PictureSource = PictureFolder | TarShards
Source = PictureSource | PromptFile


def open_sources(data: DataConfig) -> list[Source]:
    """Return the sources of a configuration.

    Raises UserError, naming the configuration key, if a source does not exist, is empty or is of no known kind.
    """
    return [_open_source(key, source.path) for key, source in data.named_sources]


def _open_source(key: str, text: str) -> Source:
    path = user_path(text)
    if path.is_dir():
        source = PictureFolder(path)
        source.check(key)
        return source
    if path.name.lower().endswith(SHARD_SUFFIXES):
        return open_shards(key, path)
    if path.suffix.lower() == ".txt" and path.is_file():
        return PromptFile(path)
    kinds = "a folder of pictures, .tar shards such as shards/*.tar, or a .txt file of prompts"
    raise UserError(f"there is no data folder at {path} ({key} may be {kinds})")


def _is_metadata(name: str) -> bool:
    return name.rpartition("/")[2] in METADATA_NAMES and kind_of(name) != HIDDEN


def _folder_repeats(name: str) -> int:
    """Return the number of a path `10_name/...`, or 1; a number of more than three digits is a year or a date."""
    match = re.match(r"(0|[1-9]\d{0,2})_[^/]*/", name)
    return int(match[1]) if match else 1


def _read_file(path: Path) -> bytes:
    """Return the content of a regular file: reading a pipe would wait forever.

    Raises OSError if it is none, or cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")
    return path.read_bytes()
