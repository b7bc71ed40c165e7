"""Build a dataclass from nested mappings, and check every key, type, choice and range.

Every error names the key, the value received and what is allowed.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UserError

MAY_CHANGE = {"may_change": True}
"""Field metadata of settings that may change on resuming. Except the number of steps, they do not affect the result of
a run, up to rounding."""

PATH = {"path": True}
"""Field metadata of paths: a control character in one is an error, as it comes from a backslash, "C:\\new"."""


def number(default: object, low: float, high: float = math.inf, *, may_change: bool = False) -> Any:
    """Declare a field for a number, or a list of numbers, in [low, high]. may_change: see MAY_CHANGE."""
    return field(default=default, metadata={"low": low, "high": high, "may_change": may_change})


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Yield one message for each field that differs between two values of a dataclass, except MAY_CHANGE fields."""
    for entry in fields(old):
        was, now = getattr(old, entry.name), getattr(new, entry.name)
        if entry.metadata.get("may_change") or was == now:
            continue
        if is_dataclass(was):
            yield from differences(was, now, f"{where}{entry.name}.")
        else:
            yield f"{where}{entry.name} was {was!r} and is {now!r}"


def fixed(settings: Any) -> dict[str, Any]:
    """Return the settings of a dataclass, nested, without its MAY_CHANGE fields."""
    named = ((entry, getattr(settings, entry.name)) for entry in fields(settings))
    return {
        entry.name: fixed(value) if is_dataclass(value) else value
        for entry, value in named
        if not entry.metadata.get("may_change")
    }


def override(values: dict[str, Any], text: str) -> None:
    """Set `section.key=value` in `values`. A value that is not valid TOML is taken as a string.

    Raises UserError if the text does not have this form, or the section is not a mapping.
    """
    path, separator, given = text.partition("=")
    *sections, key = path.strip().split(".")
    if not (separator and sections and key):
        raise UserError(f"{text!r} is not an override: write section.key=value, such as training.steps=500")
    try:
        value = tomllib.loads(f"value = {given}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = given
    table = values
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise UserError(f"{section} is {table!r}, but must be a section: write [{section}]")
    table[key] = value


def build(kind: type, values: object, where: str = "") -> Any:
    """Build the dataclass `kind` from a mapping, and check every key and value.

    where: the prefix of keys in messages, such as "data."; empty at the top.
    Raises UserError for an unknown or missing key, a wrong type, or a value out of range.
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
            arguments[entry.name] = _check(hints[entry.name], values[entry.name], where + entry.name, entry.metadata)
        elif is_dataclass(hints[entry.name]) and entry.name in _required(kind):
            arguments[entry.name] = build(hints[entry.name], {}, f"{where}{entry.name}.")
        elif entry.name in _required(kind):
            raise UserError(f"{where}{entry.name} is missing: set it in the file or as {where}{entry.name}=VALUE")
    return kind(**arguments)


def _required(kind: type) -> list[str]:
    """Return the names of the fields without a default."""
    return [entry.name for entry in fields(kind) if entry.default is MISSING and entry.default_factory is MISSING]


def _check(hint: Any, value: object, key: str, limits: Mapping[str, Any]) -> Any:
    """Check the type, choices and range of a value, and return it as `hint` has it."""
    if is_dataclass(hint):
        return build(hint, value, key + ".")  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(
                f"{key} is {value!r}, but must be a list{_list_hint(get_args(hint)[0], value, key, limits)}"
            )
        return tuple(_check(get_args(hint)[0], each, f"{key}[{i}]", limits) for i, each in enumerate(value))
    if get_origin(hint) is Union:  # a number or a word
        number_hint, words_hint = get_args(hint)
        return _check(words_hint if isinstance(value, str) else number_hint, value, key, limits)
    if get_origin(hint) is Literal:
        if value not in get_args(hint) or isinstance(value, bool):
            raise UserError(f"{key} is {value!r}, but must be one of {', '.join(map(repr, get_args(hint)))}")
        return value
    return _check_single(hint, value, key, limits)


def _check_single(hint: Any, value: Any, key: str, limits: Mapping[str, Any]) -> Any:
    """Check a string, a truth value or a number; an int is converted to float if `hint` is float."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{key} is {value!r}, but must be {_ARTICLES[hint]}")
    if "path" in limits and re.search(r"[\x00-\x1f\x7f]", value):
        raise UserError(
            f"{key} is {value!r}, with a character that no path has: in double quotes TOML takes a backslash for the "
            "start of such a character, so write / for it, or the path in single quotes"
        )
    if isinstance(value, str) and not _is_unicode(value):
        raise UserError(f"{key} is {value!r}, which is not valid Unicode: rename the file, or leave the character out")
    if "low" in limits and not (limits["low"] <= value <= limits["high"] and math.isfinite(value)):
        upper = "" if limits["high"] == math.inf else f" and at most {limits['high']:g}"
        raise UserError(f"{key} is {value!r}, but must be at least {limits['low']:g}{upper}")
    return value


def _is_unicode(text: str) -> bool:
    """Return whether a text can be written to a file; an argument of other bytes than UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _list_hint(hint: Any, value: object, key: str, limits: Mapping[str, Any]) -> str:
    """Return advice on how to write `value` as a list, for the end of a message."""
    if is_dataclass(hint):
        return f": write [[{key}]] above the keys of each"
    try:
        _check(hint, value, key, limits)
    except UserError:
        return f", each item {_ARTICLES[hint]}"
    return f": write [{json.dumps(value, ensure_ascii=False)}]"


_ARTICLES = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}
