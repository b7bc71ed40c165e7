"""Configurations to begin with, by name: what a run needs besides a model, pictures and a place for its output."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The names of all recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def find(given: Path) -> Path:
    """The configuration file that is meant by a path or by the name of a recipe; a file of that name comes first."""
    return given if given.exists() or str(given) not in names() else _FOLDER / f"{given}.toml"
