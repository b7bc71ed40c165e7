"""Choose the folder of cached latents and embeddings where a configuration names none."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..user_path import user_path

NAME = ".tcd-cache"


def default_cache(source: str) -> Path:
    """Return the cache beside a source of data, or in the user's cache folder if nothing can be written there.

    So every run on the same data finds what an earlier one has encoded, whatever its output folder.
    source: a folder or file, or a pattern of tar files; the cache is in the closest folder above it that exists.
    """
    path = user_path(source).resolve()
    beside = next(folder for folder in path.parents if folder.is_dir()) / NAME
    if beside.is_dir() or os.access(beside.parent, os.W_OK):
        return beside
    return _user_cache() / "trajectory-consistency"


def _user_cache() -> Path:
    """Return the user's cache folder: of XDG on Linux, Caches on macOS and AppData on Windows."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
