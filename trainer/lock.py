"""Lock an output folder for the life of a process, so that no second run writes into it."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from .errors import UserError

NAME = ".lock"
"""Name of the lock file: JSON with the process's pid, its host and the time at which it took the lock."""
_LOCKED_BYTE = 2**30  # far behind the content, because on Windows no other process can read a locked byte
log = logging.getLogger("trajectory-consistency")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder within the block; a folder that is created here is removed if it stays empty.

    The system releases the lock of a process that dies, so the next one can take it at once.
    Raises UserError, which names the owner, if another process holds the lock, or one on another computer has left it.
    """
    existed = folder.exists()
    file = _open_locked(folder)
    try:
        file.truncate(0)
        since = datetime.now().isoformat(" ", "seconds")
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode())
        file.flush()
        yield
    finally:
        _close_and_remove(file, folder / NAME)
        if not existed:
            with suppress(OSError):  # it has files, unless the run ended at its start
                folder.rmdir()


def _open_locked(folder: Path) -> IO[bytes]:
    """Return the lock file, open and locked."""
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115  (it stays open as long as it is locked)
    except OSError as error:
        raise UserError(
            f"output.folder is {folder}, but nothing can be written into it ({error.strerror}): choose another, or "
            "make it writable"
        ) from error
    is_free, owner = _lock(file), _read_owner(file)
    if is_free and _is_removed(file):  # its owner has ended just now, and the next file is another one
        file.close()
        return _open_locked(folder)
    if is_free and owner.get("host", socket.gethostname()) == socket.gethostname():
        return file
    file.close()
    who = "process {pid} on {host}, since {since}".format(**owner) if owner else "another process"
    if is_free:
        raise UserError(
            f"{folder} was left by {who}. From here it cannot be seen whether that still runs: if not, remove {path}"
        )
    raise UserError(f"{folder} is in use by {who}: wait until it ends, or choose another output.folder")


def _lock(file: IO[bytes]) -> bool:
    """Try to lock an open file, and return whether no other process holds the lock."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(_LOCKED_BYTE)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning("%s cannot be locked (%s): start no second run with this output.folder", file.name, error.strerror)
    return True


def _is_removed(file: IO[bytes]) -> bool:
    return os.name == "posix" and os.fstat(file.fileno()).st_nlink == 0


def _read_owner(file: IO[bytes]) -> dict[str, object]:
    """Return the content of a lock file; an empty one if it was not written yet or is damaged."""
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) and owner.keys() == {"pid", "host", "since"} else {}


def _close_and_remove(file: IO[bytes], path: Path) -> None:
    if sys.platform == "win32":  # which removes no open file, and so none that another process has taken meanwhile
        file.close()
        with suppress(OSError):
            path.unlink()
    else:  # while it is locked, so that no other process has taken it
        path.unlink(missing_ok=True)
        file.close()
