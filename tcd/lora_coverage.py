"""Compare the names and shapes of a LoRA with a model, before anything is applied."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .lora_keys import DIFF, DIFF_BIAS, DORA, LoraModule, format_shape, is_text_encoder_name, lora_modules

_MAX_LISTED = 3  # number of names that a description lists for each kind of misfit


class ShapeMismatch(NamedTuple):
    """A LoRA module, its DoRA scale or its difference of the bias, whose shape differs from the model's."""

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
            parts.append(f"for a text encoder, not in the model: {_first_few(text)}")
        if self.mismatched:
            parts.append(f"wrong shape: {_first_few([mismatch.describe() for mismatch in self.mismatched])}")
        return "; ".join(parts)


def coverage(
    state_dict: Mapping[str, Tensor], module_shapes: Mapping[str, tuple[int, ...]], biases: Collection[str] = ()
) -> Coverage:
    """Compare a LoRA in any spelling with a model, given the model's weight shapes [out, in, ...] by kohya name.

    biases: the kohya names of the modules that have a bias. A module fits with all its tensors or not at all.

    Raises ValueError if lora_modules does: for a damaged file, or for other kinds of adapters, such as LoHa.
    """
    modules, others = lora_modules(state_dict)
    matched: list[str] = []
    missing: list[str] = []
    mismatched: list[ShapeMismatch] = []
    for name, module in modules.items():
        misfit = _misfit(module, tuple(module_shapes[name])) if name in module_shapes else None
        if name not in module_shapes:
            missing.append(module.path)
        elif DIFF_BIAS in module.tensors and name not in biases:
            missing.append(f"{module.path}.{DIFF_BIAS}")
        elif misfit is not None:
            mismatched.append(misfit)
        else:
            matched.append(name)
    return Coverage(tuple(matched), (*missing, *others), tuple(mismatched))


def _misfit(module: LoraModule, expected: tuple[int, ...]) -> ShapeMismatch | None:
    """Return in what a module does not fit a weight of the shape `expected`, [out, in, ...]; None if it fits."""
    parts = {part: tuple(tensor.shape) for part, tensor in module.tensors.items()}
    if DIFF in parts:
        fits = parts[DIFF] == expected
    else:
        fits = not module.rank or _flattened(module.shape) == _flattened(expected)
    if not fits:
        return ShapeMismatch(module.path, module.shape, expected)
    if DORA in parts and not _is_dora_scale(parts[DORA], expected):
        return ShapeMismatch(f"{module.path}.{DORA}", parts[DORA], expected)
    if DIFF_BIAS in parts and parts[DIFF_BIAS] != expected[:1]:
        return ShapeMismatch(f"{module.path}.{DIFF_BIAS}", parts[DIFF_BIAS], expected[:1])
    return None


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
