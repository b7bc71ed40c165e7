"""Describes a LoRA file in words, for `tcd-train inspect`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ...tcd.lora_metadata import (
    BASE_FINGERPRINT_KEY,
    BASE_LORAS_KEY,
    CFG_KEY,
    ETA_KEY,
    FAMILY_KEY,
    SHIFT_KEY,
    STEPS_KEY,
    STRENGTH_KEY,
)
from ..lora_file import module_scale, read_lora
from .layout import layouts_of, names_of

_FACTS = {
    "base": BASE_FINGERPRINT_KEY,
    "with": BASE_LORAS_KEY,
    "shift": SHIFT_KEY,
    "steps": STEPS_KEY,
    "eta": ETA_KEY,
    "cfg": CFG_KEY,
    "strength": STRENGTH_KEY,
}
_MAX_METADATA_LENGTH = 200  # longer values, such as embedded images, are left out


def describe_file(path: Path) -> str:
    """Return the family, modules, ranks, scales, dtypes and metadata of a LoRA file, one fact a line.

    Raises UserError if it is not a LoRA.
    """
    lora = read_lora(path)
    family, modules = lora.metadata.get(FAMILY_KEY) or names_of(layouts_of(lora)), lora.modules.values()
    plain = [module for module in modules if module.rank]
    for_text = len(lora.modules) - len(lora.network_modules)
    lines = [
        f"{path}: a LoRA for {family or 'no family that is known here'}",
        f"modules   {len(modules)}, such as {next(iter(lora.modules))}",
        *([f"text      {for_text} of the modules are for a text encoder"] if for_text else []),
        f"rank      {_format_counts(Counter(module.rank for module in plain))}",
        f"scale     {_format_counts(Counter(round(module_scale(module), 6) for module in plain))} (alpha / rank)",
        f"dtype     {', '.join(str(dtype).removeprefix('torch.') for dtype in lora.dtypes)}",
    ]
    if lora.target_time is not None:
        lines.append(f"target    the network gets the target time, as {lora.target_time.target_input}")
    lines += [f"{label:<10}{lora.metadata[key]}" for label, key in _FACTS.items() if key in lora.metadata]
    short = {key: value for key, value in lora.metadata.items() if len(value) <= _MAX_METADATA_LENGTH}
    return "\n".join([*lines, *(f"{key} = {value}" for key, value in sorted(short.items()))])


def _format_counts(modules_by_value: Counter[Any]) -> str:
    return ", ".join(f"{value:g} ({count} modules)" for value, count in modules_by_value.most_common())
