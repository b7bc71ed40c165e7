"""Ready configurations, by name; a run then needs only a model, pictures and an output folder."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def find(given: Path) -> Path:
    """Return the configuration file for a path or a recipe's name; an existing file takes precedence over a recipe."""
    return given if given.exists() or str(given) not in names() else _FOLDER / f"{given}.toml"
