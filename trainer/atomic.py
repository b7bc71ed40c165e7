"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a hidden path beside `path` to write to; once the block is done, what is there is on the disk under `path`.

    When the block raises, neither exists, and what was under `path` before still is.  Raises OSError, which says what
    to do, when the disk does not take the file.
    """
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        yield unfinished
        os.chmod(unfinished, 0o644)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors reports the system's errors as its own
        raise OSError(f"{path} could not be written: {error}; make room on the disk, then start again") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # The new name is in the folder, which is written in its own time; Windows does not open folders, and needs not.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
