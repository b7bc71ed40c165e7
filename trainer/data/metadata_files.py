"""Files that list the pictures of a folder with their captions: metadata.jsonl and metadata.csv, as Hugging Face's
imagefolder reads them.
"""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
CAPTION_KEYS = ("text", "caption", "prompt")
"""Keys or columns that hold a picture's caption; the first has priority."""


def listed_captions(folder: Path, metadata: Iterable[str], files: Iterable[str]) -> dict[str, list[str]]:
    """Return the captions of each listed picture, by its path in `folder`; empty for a picture without a caption.

    metadata: paths of the metadata files in `folder`; the names in each are relative to it.
    files: paths of all files in `folder`.  A picture has the path that it has there, however a metadata file spells it.
    Raises UserError, with the line, if a file is not valid, has no captions, or names a file outside `folder`.
    """
    captions: dict[str, list[str]] = defaultdict(list)
    existing = {_one_spelling(file): file for file in files}
    for name in metadata:
        keys: dict[str, None] = {}
        found = False
        for where, entry in _entries(folder / name):
            keys |= dict.fromkeys(map(str, entry))
            picture = _path_in_folder(where, folder, Path(name).parent, entry)
            picture = existing.get(_one_spelling(picture), picture)
            texts = [_text(where, key, entry[key]) for key in CAPTION_KEYS if entry.get(key) is not None]
            captions[picture] += texts[:1]
            found = found or bool(texts)
        if keys and not found:
            raise UserError(
                f"{folder / name} has no captions: its keys are {', '.join(keys)}; name that of the captions "
                f"{', '.join(CAPTION_KEYS[:-1])} or {CAPTION_KEYS[-1]}"
            )
    return captions


def _entries(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each line, as a mapping, with its place for messages."""
    try:
        yield from _csv_entries(path) if path.suffix == ".csv" else _json_entries(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _csv_entries(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        for row in rows:
            # A row that is longer than the header has the rest under the key None.
            yield f"{path}, line {rows.line_num}", {key: value for key, value in row.items() if key is not None}


def _json_entries(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not a JSON object ({error})") from error
        if not isinstance(entry, dict):
            raise UserError(f"{where}: not a JSON object, but {type(entry).__name__}")
        yield where, entry


def _path_in_folder(where: str, folder: Path, base: Path, entry: Mapping[str, Any]) -> str:
    """Return the path of an entry's picture in `folder`, without `./`, `..` and backslashes."""
    if entry.get("file_name") is None:
        raise UserError(f"{where}: there is no file_name; the keys are {', '.join(map(str, entry)) or 'none'}")
    name = _text(where, "file_name", entry["file_name"]).replace("\\", "/")
    path = Path(os.path.abspath(folder / base / name))
    for root in map(Path, (os.path.abspath(folder), os.path.realpath(folder))):
        if root in path.parents and "\0" not in name:
            return path.relative_to(root).as_posix()
    raise UserError(f"{where}: file_name is {name!r}, which is not a file in {folder}: move the picture there")


def _one_spelling(path: str) -> str:
    """Return the same text for all spellings of a path: of Unicode and, on Windows, of capital letters."""
    return os.path.normcase(unicodedata.normalize("NFC", path))


def _text(where: str, key: str, value: object) -> str:
    """Return a value that must be a string of valid Unicode."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} is {value!r}, but must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {key} is {value!r}, which is not valid Unicode") from error
    return value
