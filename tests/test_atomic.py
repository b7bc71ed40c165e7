"""Files that are written whole or not at all, and the lock of an output folder."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from trajectory_consistency.tcd.files.atomic import atomic_write, remove_unfinished
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.lock import locked


def test_two_writers_of_one_path_do_not_mix_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "the last to end wins"
    with atomic_write(path, by_content=True) as third:
        third.write_text("third")
    assert path.read_text() == "first" and [each.name for each in tmp_path.iterdir()] == ["file.txt"]


def test_what_a_killed_writer_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    other = tmp_path / ".hidden"
    other.touch()
    with atomic_write(tmp_path / "file.txt") as live, atomic_write(tmp_path / "old.txt") as left:
        live.touch()
        left.touch()
        os.utime(left, (0, 0))
        remove_unfinished(tmp_path)
        assert live.exists() and other.exists() and not left.exists()
        left.touch()


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "make room on the disk"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "make room on the disk"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "make room on the disk"),
        (SafetensorError("I/O error: File too large (os error 27)"), "takes no file so large: choose another folder"),
        (PermissionError(errno.EACCES, "Permission denied"), "make FOLDER writable"),
        (OSError(errno.EROFS, "Read-only file system"), "make FOLDER writable"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "make sure that FOLDER is there"),
        (OSError(errno.EIO, "Input/output error"), "make sure that FOLDER is there and can be written to"),
    ],
)
def test_the_advice_is_for_the_error(tmp_path: Path, error: Exception, advice: str) -> None:
    with pytest.raises(OSError, match="x.txt could not be written") as caught, atomic_write(tmp_path / "x.txt"):
        raise error
    assert advice.replace("FOLDER", str(tmp_path)) in str(caught.value)
    assert "make room" in advice or "make room" not in str(caught.value)


HOLDER = """
import sys, time
from pathlib import Path
from trajectory_consistency.trainer.lock import locked
with locked(Path(sys.argv[1])):
    print(flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_is_refused_with_its_owner_and_free_when_that_was_killed(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        with pytest.raises(UserError) as caught, locked(folder):
            raise AssertionError
        assert f"{folder} is in use by process {holder.pid} on {socket.gethostname()}, since 20" in str(caught.value)
    finally:
        holder.kill()
        holder.wait()
    assert json.loads((folder / ".lock").read_text())["pid"] == holder.pid
    with locked(folder):
        assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"), locked(folder):
            raise AssertionError
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_lock_left_on_another_computer_says_what_to_remove(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"pid": 7, "host": "another", "since": "2026-01-01 12:00:00"}))
    with pytest.raises(UserError, match=f"left by process 7 on another, since 2026.*: if not, remove {lock}"):
        locked(tmp_path).__enter__()
    for damaged in ("", "{", "[7]", "{}"):
        lock.write_text(damaged)
        with locked(tmp_path):
            pass
        assert not lock.exists()


def test_a_folder_that_is_made_for_a_run_that_does_not_begin_is_removed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wrong"), locked(tmp_path / "runs" / "out"):
        raise UserError("wrong")
    assert not (tmp_path / "runs" / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="output.folder is .*file, but nothing can be written into it"):
        locked(tmp_path / "file").__enter__()
