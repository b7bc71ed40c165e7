"""Names of LoRA tensors, as pure dict -> dict; and how much of a file fits a model.

kohya names are the one spelling that ComfyUI and diffusers both map completely on SD1.5 and SDXL:
lora_unet_<module path with _>.lora_down.weight [r, in, ...], .lora_up.weight [out, r, ...] and .alpha [].
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_PEFT_NAME = re.compile(r"(?:unet\.)?(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_KOHYA_NAME = re.compile(r"(?P<module>lora_[^.]+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha)")
_PART = {"A": "lora_down.weight", "B": "lora_up.weight"}
_SHOWN = 3  # names of each kind that a description spells out


def kohya_name(module_path: str) -> str:
    """Return the kohya name of a UNet module, given its diffusers path: "mid_block.x" is "lora_unet_mid_block_x"."""
    return "lora_unet_" + module_path.replace(".", "_")


def to_kohya(peft_state_dict: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Rename a UNet adapter's PEFT tensors to kohya names, and write alpha (float32, []) for each module.

    Takes "x.lora_A.weight" [r, in, ...] and "x.lora_B.weight" [out, r, ...], also as ".lora_A.default.weight" and with
    "unet." and "base_model.model." before it. Tensors are passed on as they are.

    Raises ValueError for another name, two names that become one, a module with one half only, and a bad alpha.
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha is {alpha!r}, but must be a positive number")
    renamed: dict[str, Tensor] = {}
    for name, tensor in peft_state_dict.items():
        match = _PEFT_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} is not the name of a PEFT LoRA tensor, such as x.lora_A.weight")
        key = f"{kohya_name(match['module'])}.{_PART[match['side']]}"
        if key in renamed:
            raise ValueError(f"{name} and another tensor would both be named {key}")
        renamed[key] = tensor
    for module in _group(renamed)[0]:
        renamed[f"{module}.alpha"] = torch.tensor(float(alpha))
    return renamed


class ShapeMismatch(NamedTuple):
    """A LoRA module whose product does not have the shape of the weight that it is to change."""

    module: str
    found: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True)
class Coverage:
    """How much of a LoRA file fits a model, by kohya module name."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]  # in the file but not in the model, or not named as kohya does
    mismatched: tuple[ShapeMismatch, ...]

    @property
    def complete(self) -> bool:
        """Whether the file has something for the model, and all of it fits."""
        return bool(self.matched) and not self.missing and not self.mismatched

    def describe(self) -> str:
        """Say in one line what fits and what does not."""
        total = len(self.matched) + len(self.missing) + len(self.mismatched)
        parts = [f"{len(self.matched)} of {total} LoRA modules fit the model"]
        if self.missing:
            parts.append(f"not in the model: {_some(self.missing)}")
        if self.mismatched:
            shapes = [f"{m.module} is {_by(m.found)}, but the model has {_by(m.expected)}" for m in self.mismatched]
            parts.append(f"wrong shape: {_some(shapes)}")
        return "; ".join(parts)


def coverage(state_dict: Mapping[str, Tensor], module_shapes: Mapping[str, tuple[int, ...]]) -> Coverage:
    """Compare a kohya LoRA file with the weight shapes [out, in, ...] of a model, by kohya module name.

    Raises ValueError for a module with one half only, or whose halves are not of one rank: such a file is damaged.
    """
    modules, others = _group(state_dict)
    matched: list[str] = []
    missing = list(others)
    mismatched: list[ShapeMismatch] = []
    for module, (down, up) in modules.items():
        expected = tuple(module_shapes.get(module, ()))
        found = (up.shape[0], *down.shape[1:])
        if module not in module_shapes:
            missing.append(module)
        elif _flat(found) != _flat(expected):
            mismatched.append(ShapeMismatch(module, found, expected))
        else:
            matched.append(module)
    return Coverage(tuple(matched), tuple(missing), tuple(mismatched))


class _Pair(NamedTuple):
    down: Tensor
    up: Tensor


def _group(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, _Pair], list[str]]:
    """Gather the halves of each module, in the file's order; and the names that are not kohya's."""
    parts: dict[str, dict[str, Tensor]] = {}
    others: list[str] = []
    for name, tensor in state_dict.items():
        match = _KOHYA_NAME.fullmatch(name)
        if match is None:
            others.append(name)
        else:
            parts.setdefault(match["module"], {})[match["part"]] = tensor
    return {module: _pair(module, tensors) for module, tensors in parts.items()}, others


def _pair(module: str, tensors: Mapping[str, Tensor]) -> _Pair:
    absent = [part for part in _PART.values() if part not in tensors]
    if absent:
        raise ValueError(f"{module} has no {' and no '.join(absent)}: the LoRA is damaged")
    down, up = (tensors[part] for part in _PART.values())
    if down.ndim < 2 or up.ndim < 2 or up.numel() != up.shape[0] * down.shape[0]:
        raise ValueError(
            f"{module} has lora_down {_by(down.shape)} and lora_up {_by(up.shape)}, "
            "which are not of one rank: the LoRA is damaged"
        )
    return _Pair(down, up)


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    # The host multiplies flattened halves and reshapes the product, so a linear half may serve a 1 x 1 convolution.
    return shape[0], math.prod(shape[1:])


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape) or "a number"


def _some(names: list[str] | tuple[str, ...]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
