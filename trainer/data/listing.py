"""One rule for the files of a folder and the members of a shard: which are pictures, which captions, and which belong
together. No file is left out without a reason that is counted and named.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

from .pictures import SUFFIXES

CAPTION_SUFFIXES = (".txt", ".caption")
"""Suffixes of caption files, lower case; the first has priority."""
UNREAD_SUFFIXES = {".arw", ".cr2", ".dng", ".exr", ".heic", ".heif", ".jp2", ".jxl", ".nef", ".psd", ".svg", ".tga"}
"""Suffixes of pictures in formats that are not read, lower case."""
_SYSTEM_FOLDERS = {"__MACOSX", "@eaDir"}
"""Folders of copies and thumbnails that an operating system makes, without the dot of a hidden name."""
UNREAD = "are in a format that is not read"
"""A problem of samples; it completes a message "3 of 9 pictures ..."."""
HIDDEN, OTHER = "hidden", "neither pictures nor captions"
UNREAD_COPY = "in a format that is not read, beside a picture of the same name"
FURTHER = "further pictures of a sample, such as 1.mask.png beside 1.png"
SECOND, NO_PICTURE = "captions of a picture that has another caption", "captions without a picture"
"""Reasons why files are left out; each completes a message "...: 3 (a.png, b.png, c.png)"."""


class Entry(NamedTuple):
    """A file, and what it is used for: a picture with its caption, unless there is a problem or a note."""

    name: str
    caption: str | None = None
    """Name of the picture's caption file; None if it has none."""
    problem: str = ""
    """Why the sample cannot be used."""
    note: str = ""
    """Why the file is left out, which is not a problem."""


def sort_files(names: Iterable[str], listed: Collection[str] = ()) -> list[Entry]:
    """Return what each file is used for, except the captions that belong to a picture; sorted by name.

    A picture's caption is the one of the same name, apart from the suffix.  Without one it is the caption `key.txt` for
    `key.more.png`, as in the webdataset format, unless that is the caption of a picture `key.png`.
    names: paths with forward slashes.
    listed: the pictures among them whose captions are known, which need no caption file.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in sorted(set(names)):
        kinds["listed" if name in listed else kind_of(name)].append(name)
    captions: dict[str, list[str]] = defaultdict(list)
    for name in sorted(kinds["caption"], key=lambda name: (CAPTION_SUFFIXES.index(_suffix(name)), name)):
        captions[_stem(name)].append(name)
    left_out = (Entry(name, note=note) for note in (HIDDEN, OTHER) for name in kinds[note])
    entries = [*map(Entry, kinds["listed"]), *left_out, *_pair(kinds["picture"], kinds[UNREAD], captions)]
    with_picture = {_stem(name) for kind in ("listed", "picture", UNREAD) for name in kinds[kind]}
    entries += _spare_captions(captions, {entry.caption for entry in entries}, with_picture)
    return sorted(entries, key=lambda entry: entry.name)


def kind_of(name: str) -> str:
    """Return "picture" or "caption", or the reason why a file of this name is neither: UNREAD, HIDDEN or OTHER."""
    if any(part.startswith(".") or part in _SYSTEM_FOLDERS for part in name.split("/") if part not in (".", "..")):
        return HIDDEN
    if _suffix(name) in CAPTION_SUFFIXES:
        return "caption"
    if _suffix(name) in SUFFIXES:
        return "picture"
    return UNREAD if _suffix(name) in UNREAD_SUFFIXES else OTHER


def _pair(pictures: list[str], unread: list[str], captions: dict[str, list[str]]) -> Iterator[Entry]:
    """Yield each picture with its caption; captions: names of caption files by their name without suffix."""
    stems, readable = {_stem(name) for name in [*pictures, *unread]}, {_stem(name) for name in pictures}
    for name in [*pictures, *unread]:
        stem = _stem(name)
        nearest = next((shorter for shorter in _shorter_stems(stem) if shorter in captions), None)
        if nearest != stem and nearest in stems:
            yield Entry(name, note=FURTHER)
            continue
        caption = captions[nearest][0] if nearest is not None else None
        if name in unread:
            copy = stem in readable
            yield Entry(name, caption, "" if copy else UNREAD, UNREAD_COPY if copy else "")
        else:
            yield Entry(name, caption)


def _spare_captions(
    captions: dict[str, list[str]], used: Collection[str | None], with_picture: Collection[str]
) -> Iterator[Entry]:
    for stem, names in captions.items():
        has_picture = stem in with_picture or names[0] in used
        for name in names:
            if name not in used:
                yield Entry(name, note=SECOND if has_picture else NO_PICTURE)


def _shorter_stems(stem: str) -> Iterator[str]:
    """Yield `a/b.c.d`, `a/b.c`, `a/b`."""
    folder, slash, base = stem.rpartition("/")
    parts = base.split(".")
    for count in range(len(parts), 0, -1):
        yield folder + slash + ".".join(parts[:count])


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _stem(name: str) -> str:
    """Return the name without its suffix, in one spelling where Unicode has several."""
    return unicodedata.normalize("NFC", name[: len(name) - len(PurePosixPath(name).suffix)])
