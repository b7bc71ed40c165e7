"""How much of a LoRA fits a model, told before anything of it is applied. Names and shapes alone are looked at."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .lora_keys import DORA, by, lora_modules

_SHOWN = 3  # names of each kind that a description spells out
_TEXT_ENCODER = re.compile(r"lora_te\d?_.*|(base_model\.model\.)?text_encoders?(_\d)?\..*")


class ShapeMismatch(NamedTuple):
    """A LoRA module, or its DoRA scale, that does not have the shape of the weight that it is to change."""

    module: str
    found: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True)
class Coverage:
    """How much of a LoRA fits a model: kohya names of what does, and the file's own names of what does not."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]  # modules that the model lacks, and tensors that are not a LoRA's
    mismatched: tuple[ShapeMismatch, ...]

    @property
    def complete(self) -> bool:
        """Whether the file has something for the model, and all of it fits."""
        return bool(self.matched) and not self.missing and not self.mismatched

    def describe(self) -> str:
        """Say in one line what fits and what does not."""
        total = len(self.matched) + len(self.missing) + len(self.mismatched)
        parts = [f"{len(self.matched)} of {total} LoRA modules fit the model"]
        text = [name for name in self.missing if _TEXT_ENCODER.fullmatch(name)]
        others = [name for name in self.missing if not _TEXT_ENCODER.fullmatch(name)]
        if others:
            parts.append(f"not in the model: {_some(others)}")
        if text:
            parts.append(f"for a text encoder, which is left alone: {_some(text)}")
        if self.mismatched:
            shapes = [f"{m.module} is {by(m.found)}, but the model has {by(m.expected)}" for m in self.mismatched]
            parts.append(f"wrong shape: {_some(shapes)}")
        return "; ".join(parts)


def coverage(state_dict: Mapping[str, Tensor], module_shapes: Mapping[str, tuple[int, ...]]) -> Coverage:
    """Compare a LoRA, whatever its spelling, with the weight shapes [out, in, ...] of a model by kohya module name.

    Raises ValueError as lora_modules does: for a file that is damaged, or not a LoRA's.
    """
    modules, others = lora_modules(state_dict)
    matched: list[str] = []
    missing: list[str] = []
    mismatched: list[ShapeMismatch] = []
    for name, module in modules.items():
        if name not in module_shapes:
            missing.append(module.path)
            continue
        expected = tuple(module_shapes[name])
        scale = tuple(module.tensors[DORA].shape) if DORA in module.tensors else None
        if _flat(module.shape) != _flat(expected):
            mismatched.append(ShapeMismatch(module.path, module.shape, expected))
        elif scale is not None and not _scales(scale, expected):
            mismatched.append(ShapeMismatch(f"{module.path}.{DORA}", scale, expected))
        else:
            matched.append(name)
    return Coverage(tuple(matched), (*missing, *others), tuple(mismatched))


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    # The host multiplies flattened halves and reshapes the product, so a linear half may serve a 1 x 1 convolution.
    return shape[0], math.prod(shape[1:])


def _scales(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a DoRA scale has one number for each output, or for each input, of a weight [out, in, ...]."""
    ones = (1,) * (len(weight) - 2)
    return scale in ((weight[0], 1, *ones), (1, weight[1], *ones))


def _some(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
