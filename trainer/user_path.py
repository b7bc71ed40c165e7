"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(text: str) -> Path:
    """Return the path with `~` or `~name` replaced by the user's home folder, where there is such a user."""
    return Path(os.path.expanduser(text))  # Path.expanduser raises RuntimeError for a name without a home
