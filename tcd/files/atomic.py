"""Write files atomically: after a crash a file is either complete or absent."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import time

from safetensors import SafetensorError

_ABANDONED_SECONDS = 3600.0
"""A temporary file older than this was left by a process that was killed: a live one finishes its file sooner."""


@contextmanager
def atomic_write(path: Path, *, by_content: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends, sync the file written there and rename it to `path`.

    The temporary path is unique, so that several processes may write `path` at the same time: the last one wins.
    by_content: `path` is named by its content, so that a file which is there already stays. Another process may have it
    open, and Windows replaces no such file.
    If the block raises, the temporary file is removed and an existing file at `path` is left as it was. If the process
    is killed, it stays behind until `remove_unfinished`.
    Raises OSError, with advice for the user, if the file cannot be written.
    """
    unfinished = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.unfinished{path.suffix}")
    try:
        yield unfinished
        os.chmod(unfinished, 0o644)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        if not (by_content and path.exists()):
            unfinished.replace(path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors in its own
        raise OSError(f"{path} could not be written: {error}; {write_advice(path, error)}, then start again") from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_advice(path: Path, error: Exception) -> str:
    """Return what to do about an error of the system when `path` was written."""
    code = getattr(error, "errno", None) or _code_in(str(error))
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "make room on the disk"
    if code == errno.EFBIG:
        return f"the disk of {path.parent}, or a limit of the system, takes no file so large: choose another folder"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"make {path.parent} writable, and close programs that have the file open"
    return f"make sure that {path.parent} is there and can be written to"


def remove_unfinished(folder: Path, *, older_than: float = _ABANDONED_SECONDS) -> None:
    """Remove the temporary files of `atomic_write` in a folder that have not changed for `older_than` seconds.

    With 0, no other process may write into the folder.
    """
    for path in folder.glob(".*.unfinished*"):
        try:
            if time() - path.stat().st_mtime >= older_than:
                path.unlink()
        except FileNotFoundError:  # another process has finished or removed it meanwhile
            continue


def _code_in(message: str) -> int:
    """Return the system's error code at the end of an error of safetensors, "... (os error 28)", or 0."""
    _, _, code = message.partition("(os error ")
    digits = code.partition(")")[0]
    return int(digits) if digits.isdecimal() else 0


def _sync_folder(folder: Path) -> None:
    # The rename is recorded in the folder, so the folder must be synced too. Windows cannot open a folder to sync it.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
