"""Mappings to dataclasses: every key known, every value of its type and in its range, and errors that name the key.

Flows in: a dataclass, and nested mappings as TOML gives them.  Flows out: a value of it, or a `UserError`.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import UserError

# Of settings that say how a run is done and not, but for rounding, what comes out: a run that goes on from a checkpoint
# may do so with other ones.
FREE = {"free": True}


def number(default: object, low: float, high: float = math.inf, *, free: bool = False) -> Any:
    """A numeric field, or a list of numbers, with an inclusive range."""
    return field(default=default, metadata={"low": low, "high": high, "free": free})


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """The fields of two values of one dataclass that are not equal, in words, but for those that are FREE."""
    for entry in fields(old):
        was, now = getattr(old, entry.name), getattr(new, entry.name)
        if entry.metadata.get("free") or was == now:
            continue
        if is_dataclass(was):
            yield from differences(was, now, f"{where}{entry.name}.")
        else:
            yield f"{where}{entry.name} was {was!r} and is {now!r}"


def override(values: dict[str, Any], text: str) -> None:
    """Put `section.key=value` into `values`; the value is TOML, or else a bare string.

    Raises UserError for a text that is not of this form.
    """
    path, separator, given = text.partition("=")
    *sections, key = path.strip().split(".")
    if not (separator and sections and key):
        raise UserError(f"{text!r} is not an override: write section.key=value, such as training.steps=500")
    try:
        value = tomllib.loads(f"value = {given}")["value"]
    except tomllib.TOMLDecodeError:
        value = given
    table = values
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise UserError(f"{section} is {table!r}, but must be a section: write [{section}]")
    table[key] = value


def build(kind: type, values: object, where: str = "") -> Any:
    """Build the dataclass `kind` from a mapping, checking every key and value; `where` ends with a dot or is empty.

    Raises UserError for an unknown or missing key, a wrong type, and a value out of range.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where.rstrip('.')} is {values!r}, but must be a section: write [{where.rstrip('.')}]")
    hints = get_type_hints(kind)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"the keys here are {', '.join(hints)}"
            raise UserError(f"unknown key {where}{key}: {hint}")
    arguments = {}
    for entry in fields(kind):
        if entry.name in values:
            arguments[entry.name] = _checked(hints[entry.name], values[entry.name], where + entry.name, entry.metadata)
        elif is_dataclass(hints[entry.name]) and entry.name in _required(kind):
            arguments[entry.name] = build(hints[entry.name], {}, f"{where}{entry.name}.")
        elif entry.name in _required(kind):
            raise UserError(f"{where}{entry.name} is missing: set it in the file or as {where}{entry.name}=VALUE")
    return kind(**arguments)


def _required(kind: type) -> list[str]:
    """Names of the fields of a dataclass that have no default."""
    return [entry.name for entry in fields(kind) if entry.default is MISSING and entry.default_factory is MISSING]


def _checked(hint: Any, value: object, key: str, limits: Mapping[str, Any]) -> Any:
    """Check one value against its type, choices and range."""
    if is_dataclass(hint):
        return build(hint, value, key + ".")  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{key} is {value!r}, but must be a list{_as_list(get_args(hint)[0], value, key, limits)}")
        return tuple(_checked(get_args(hint)[0], each, f"{key}[{i}]", limits) for i, each in enumerate(value))
    if get_origin(hint) is Literal:
        if value not in get_args(hint) or isinstance(value, bool):
            raise UserError(f"{key} is {value!r}, but must be one of {', '.join(map(repr, get_args(hint)))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{key} is {value!r}, but must be {_ARTICLES[hint]}")
    if "low" in limits and not (limits["low"] <= value <= limits["high"] and math.isfinite(value)):
        upper = "" if limits["high"] == math.inf else f" and at most {limits['high']:g}"
        raise UserError(f"{key} is {value!r}, but must be at least {limits['low']:g}{upper}")
    return value


def _as_list(hint: Any, value: object, key: str, limits: Mapping[str, Any]) -> str:
    """How to write the list that was meant by `value`, where it can be told."""
    if is_dataclass(hint):
        return f": write [[{key}]] above the keys of each"
    try:
        _checked(hint, value, key, limits)
    except UserError:
        return f", each item {_ARTICLES[hint]}"
    return f": write [{json.dumps(value, ensure_ascii=False)}]"


_ARTICLES = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
