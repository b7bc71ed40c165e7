"""Write files atomically: after a crash a file is either complete or absent."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def atomic_write(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends, sync the file written there and rename it to `path`.

    shared: whether other processes may write the same content to `path` at the same time; each then has a temporary
    path of its own, which stays behind if the process is killed.
    If the block raises, the temporary file is removed and an existing file at `path` is left as it was.
    Raises OSError, with advice for the user, if the file cannot be written.
    """
    own = f".{secrets.token_hex(8)}" if shared else ""
    unfinished = path.with_name(f".{path.stem}{own}.unfinished{path.suffix}")
    try:
        yield unfinished
        os.chmod(unfinished, 0o644)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors in its own
        raise OSError(f"{path} could not be written: {error}; make room on the disk, then start again") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # The rename is recorded in the folder, so the folder must be synced too. Windows cannot open a folder to sync it.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
