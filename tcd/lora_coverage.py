"""Compare the names and shapes of a LoRA with a model, before anything is applied."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .lora_keys import DORA, format_shape, lora_modules

_MAX_LISTED = 3  # number of names that a description lists for each kind of misfit
_TEXT_ENCODER = re.compile(r"lora_te\d?_.*|(base_model\.model\.)?text_encoders?(_\d)?\..*")


class ShapeMismatch(NamedTuple):
    """A LoRA module, or its DoRA scale, whose shape differs from the shape of the model's weight."""

    module: str
    found: tuple[int, ...]
    expected: tuple[int, ...]

    def describe(self) -> str:
        """Describe the mismatch, with both shapes."""
        return f"{self.module} is {format_shape(self.found)}, but the model has {format_shape(self.expected)}"


@dataclass(frozen=True)
class Coverage:
    """The modules of a LoRA that fit a model (`matched`, by kohya name) and the rest (by the file's own names)."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]  # modules that the model does not have, and tensors that do not belong to a LoRA
    mismatched: tuple[ShapeMismatch, ...]

    @property
    def complete(self) -> bool:
        """Whether the file has at least one module and all of them fit."""
        return bool(self.matched) and not self.missing and not self.mismatched

    def describe(self) -> str:
        """Describe in one line what fits and what does not."""
        total = len(self.matched) + len(self.missing) + len(self.mismatched)
        parts = [f"{len(self.matched)} of {total} LoRA modules fit the model"]
        text = [name for name in self.missing if is_text_encoder_name(name)]
        others = [name for name in self.missing if not is_text_encoder_name(name)]
        if others:
            parts.append(f"not in the model: {_first_few(others)}")
        if text:
            parts.append(f"for a text encoder, which is left alone: {_first_few(text)}")
        if self.mismatched:
            parts.append(f"wrong shape: {_first_few([mismatch.describe() for mismatch in self.mismatched])}")
        return "; ".join(parts)


def is_text_encoder_name(name: str) -> bool:
    """Return whether a tensor or module of a LoRA is for a text encoder, by its name in the file."""
    return _TEXT_ENCODER.fullmatch(name) is not None


def coverage(state_dict: Mapping[str, Tensor], module_shapes: Mapping[str, tuple[int, ...]]) -> Coverage:
    """Compare a LoRA in any spelling with a model, given the model's weight shapes [out, in, ...] by kohya name.

    Raises ValueError if lora_modules does: for a damaged file, or for other kinds of adapters, such as LoHa.
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
        if _flattened(module.shape) != _flattened(expected):
            mismatched.append(ShapeMismatch(module.path, module.shape, expected))
        elif scale is not None and not _is_dora_scale(scale, expected):
            mismatched.append(ShapeMismatch(f"{module.path}.{DORA}", scale, expected))
        else:
            matched.append(name)
    return Coverage(tuple(matched), (*missing, *others), tuple(mismatched))


def _flattened(shape: tuple[int, ...]) -> tuple[int, int]:
    # The host flattens both matrices and reshapes their product, so a linear LoRA fits a 1 x 1 convolution.
    return shape[0], math.prod(shape[1:])


def _is_dora_scale(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a DoRA scale of this shape has one number per output, or per input, of a weight [out, in, ...]."""
    ones = (1,) * (len(weight) - 2)
    return scale in ((weight[0], 1, *ones), (1, weight[1], *ones))


def _first_few(names: list[str]) -> str:
    rest = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")
