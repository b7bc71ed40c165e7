"""The header of a LoRA file: its tensors' names and shapes, its base model, and the settings that it recommends."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from ..tcd import TargetInput, alpha_by_metadata, lora_modules, split_name, split_target_time
from ..tcd.lora_metadata import (
    CFG_KEY,
    DEFAULT_CFG,
    DEFAULT_ETA,
    DEFAULT_STEPS,
    DEFAULT_TARGET_INPUT,
    ETA_KEY,
    FAMILY_KEY,
    SHIFT_KEY,
    STEPS_KEY,
    TARGET_TIME_KEY,
    TARGET_TIME_MODULE_KEY,
)
from ..tcd.target_time import checked_target_input, embedding_shape
from .ranges import check_range

_BASE_BY_CONTEXT_WIDTH = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
_BASE_BY_NAME = {"single_transformer_blocks_": "Flux", "double_blocks_": "Flux", "joint_blocks_": "SD3"}
_SAME_SHIFT = 1e-3  # relative; files have six digits
_CHECKPOINT_PREFIXES = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")


class RecommendedSettings(NamedTuple):
    """The sampling settings that a LoRA file recommends."""

    steps: int
    eta: float
    cfg: float


class FileStamp(NamedTuple):
    """Identifies the version of a file: the stamp changes if the file is replaced."""

    path: str
    modified_ns: int
    size: int


@dataclass(frozen=True)
class LoraFile:
    """The header of a LoRA file; name is its entry in the host's list, and the tensors are on the meta device.

    A LoRA that is in memory, and in no file, has no stamp, and its tensors are the tensors themselves.

    Raises ValueError if the file is not a LoRA or is damaged.
    """

    name: str
    stamp: FileStamp | None
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    def __post_init__(self) -> None:
        """Raise ValueError if the file is not a LoRA or is damaged."""
        if any(name.startswith(_CHECKPOINT_PREFIXES) and not _is_of_lora(name) for name in self.tensors):
            raise ValueError(f"{self.name} is a checkpoint, not a LoRA: put it in models/checkpoints")
        try:
            modules, others = lora_modules(self.lora_tensors)
            _ = self.target_input, self.alpha
        except ValueError as error:
            raise ValueError(f"{self.name} was not applied: {error}") from None
        if not modules:
            reason = f"the first of its {len(others)} tensors is {others[0]}" if others else "it has no tensors"
            raise ValueError(f"{self.name} is not a LoRA: {reason}")

    def base_model(self) -> str:
        """Name the base model that the file is for, from its metadata, or else from its tensor names and shapes."""
        for key in ("modelspec.architecture", "ss_base_model_version"):
            if self.metadata.get(key):
                return self.metadata[key]
        for name, module in lora_modules(self.lora_tensors)[0].items():
            for mark, base in _BASE_BY_NAME.items():
                if mark in name:
                    return base
            if name.endswith("attn2_to_k") and module.rank:
                width = module.shape[1]
                return _BASE_BY_CONTEXT_WIDTH.get(width, f"a model with cross-attention to {width} channels")
        return "a model of unknown kind"

    @cached_property
    def lora_tensors(self) -> Mapping[str, Tensor]:
        """The tensors of the LoRA, without those of the target-time embedding."""
        return split_target_time(self.tensors)[0]

    @cached_property
    def target_time_shape(self) -> tuple[int, int] | None:
        """(channels, width) of the target-time embedding, or None if the file has none.

        Raises ValueError if the embedding is damaged.
        """
        _, embedding = split_target_time(self.tensors)
        return embedding_shape(embedding) if embedding else None

    @cached_property
    def target_input(self) -> TargetInput | None:
        """The input of the target-time embedding, or None without one. Raises ValueError for an unknown value."""
        if not self.target_time_shape:
            return None
        return checked_target_input(self.metadata.get(TARGET_TIME_KEY, DEFAULT_TARGET_INPUT))

    @property
    def target_time_module(self) -> str | None:
        """The path of the layer to whose output the embedding is added, or None if the file does not name it."""
        return self.metadata.get(TARGET_TIME_MODULE_KEY)

    def differences(self, family: str, shift: float | None) -> list[str]:
        """Return in what a model differs from the base that the file was trained on, with what to do about it.

        family: the host's name of the model's architecture. shift: of its noise schedule; None if it has none. What the
        file does not say is not compared. Raises ValueError if the file's shift is not a number.
        """
        found = []
        trained_on = self.metadata.get(FAMILY_KEY)
        if trained_on is not None and trained_on != family:
            found.append(f"it was trained on {trained_on}, and the model is {family}: use a model of that family")
        trained_shift = self._number(SHIFT_KEY, float, math.nan, low=0, high=math.inf)
        if shift is not None and abs(trained_shift - shift) > _SAME_SHIFT * shift:
            found.append(
                f"it was trained with shift {trained_shift:g}, and the model has {shift:g}: set that of the model to "
                f"{trained_shift:g}, by the node ModelSampling of its family, before this node"
            )
        return found

    @cached_property
    def alpha(self) -> Callable[[str, int], float | None]:
        """The alpha of a module without one, by (path, rank), from the metadata. Raises ValueError if it is damaged."""
        return alpha_by_metadata(self.metadata)

    def recommended_settings(self) -> RecommendedSettings:
        """Return the metadata tcd.steps, tcd.eta and tcd.cfg; keys that the file does not have get their defaults.

        Raises ValueError if a value is not a number (steps: a whole number), or is outside the range of its widget.
        """
        return RecommendedSettings(
            int(self._number(STEPS_KEY, int, DEFAULT_STEPS, low=1, high=50)),
            self._number(ETA_KEY, float, DEFAULT_ETA, low=0, high=1),
            self._number(CFG_KEY, float, DEFAULT_CFG, low=0, high=100),
        )

    def _number(self, key: str, kind: type[int] | type[float], default: float, *, low: float, high: float) -> float:
        text = self.metadata.get(key)
        if text is None:
            return default
        label = f"{key} in the metadata of {self.name}"
        try:
            value = kind(text)
        except ValueError:
            number = "a whole number" if kind is int else "a number"
            raise ValueError(f"{label} is {text!r}, but must be {number}") from None
        check_range(label, value, low, high)
        return value


def _is_of_lora(name: str) -> bool:
    return "lora" in name or split_name(name) is not None
