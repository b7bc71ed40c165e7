"""The list of all configuration keys in docs/training.md, made of settings.py: run this file to write it anew."""

import ast
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from trajectory_consistency.trainer.config import base, data
from trajectory_consistency.trainer.config import settings as config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "training.md"
BEGIN, END = "<!-- keys: written by tests/config_table.py -->\n", "<!-- end of keys -->\n"


def table() -> str:
    """A table to each section: key, default, and what settings.py says of it."""
    comments = _comments()
    return "".join(_section(config.Config, "", comments))


def undescribed() -> list[str]:
    """The keys of which settings.py says nothing."""
    comments = _comments()
    kinds = [kind for kind in vars(config).values() if isinstance(kind, type) and is_dataclass(kind)]
    return [
        f"{kind.__name__}.{entry.name}"
        for kind in kinds
        for entry in fields(kind)
        if not is_dataclass(get_type_hints(kind)[entry.name]) and not comments.get((kind.__name__, entry.name))
    ]


def _section(kind: type, prefix: str, comments: dict[tuple[str, str], str]) -> list[str]:
    hints, lines, inner = get_type_hints(kind), [], []
    for entry in fields(kind):
        name, hint = prefix + entry.name, hints[entry.name]
        if is_dataclass(hint):
            inner += _section(hint, f"{name}.", comments)  # type: ignore[arg-type]
            continue
        items = get_args(hint)[0] if get_origin(hint) is tuple else None
        if is_dataclass(items):
            inner += _section(items, f"{name}[].", comments)  # type: ignore[arg-type]
        said = comments.get((kind.__name__, entry.name), "")
        lines.append(f"| `{name}` | {_default(entry)} | {_values(hint, entry)}{said} |\n")
    head = [f"\n### {prefix.rstrip('.')}\n\n", "| key | default | |\n|---|---|---|\n"] if lines else []
    return [*head, *lines, *inner]


def _default(entry: "Field[Any]") -> str:
    if entry.default is MISSING and entry.default_factory is MISSING:
        return "required"
    value = entry.default if entry.default is not MISSING else entry.default_factory()  # type: ignore[misc]
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    text = str(list(value)) if isinstance(value, tuple) else f'"{value}"' if isinstance(value, str) else f"{value:g}"
    return f"`{text}`".replace("'", '"')


def _values(hint: Any, entry: "Field[Any]") -> str:
    """The choices or the range, where there are some."""
    if get_origin(hint) is Literal:
        return " ".join(f"`{choice}`" for choice in get_args(hint)) + ". "
    low, high = entry.metadata.get("low"), entry.metadata.get("high")
    if low is None:
        return ""
    return f"From {low:g}. " if high == float("inf") else f"{low:g} to {high:g}. "


def _comments() -> dict[tuple[str, str], str]:
    """The text that stands below each field in settings.py, base.py and data.py, in one line."""
    found: dict[tuple[str, str], str] = {}
    trees = [ast.parse(Path(module.__file__).read_text(encoding="utf-8")) for module in (config, base, data)]
    for kind in (node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)):
        for statement, following in zip(kind.body, kind.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                found[kind.name, statement.target.id] = " ".join(str(following.value.value).split()).replace("|", "\\|")
    return found


def main() -> None:
    """Write the table into the page."""
    text = DOCS.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    DOCS.write_text(before + BEGIN + table() + "\n" + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
