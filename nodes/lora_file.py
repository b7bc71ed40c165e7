"""A LoRA file as its header tells: what it is, what it was made for, and with which settings it is best used."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from ..tcd import Told, lora_modules, peft_alpha, split_target_time
from ..tcd.target_time import checked_told, shape_of
from .ranges import check_range

_BASE_BY_CONTEXT_WIDTH = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
_BASE_BY_NAME = {"single_transformer_blocks_": "Flux", "double_blocks_": "Flux", "joint_blocks_": "SD3"}
_ADAPTER = "lora_adapter_metadata"  # where diffusers >= 0.33 writes PEFT's settings
_TOLD = "tcd.target_time"
_CHECKPOINT = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")


class Settings(NamedTuple):
    """The settings that the maker of a LoRA recommends; as here, where the file does not say."""

    steps: int = 4
    eta: float = 0.3
    cfg: float = 1.0


class Stamp(NamedTuple):
    """What of a file changes when the file does."""

    path: str
    modified_ns: int
    size: int


@dataclass(frozen=True)
class LoraFile:
    """The header of a LoRA file, under the name by which the host lists it; its tensors are on the meta device.

    Raises ValueError for a file that is not a LoRA, or a damaged one.
    """

    name: str
    stamp: Stamp
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    def __post_init__(self) -> None:
        """Refuse what is not a LoRA."""
        if any(name.startswith(_CHECKPOINT) and "lora" not in name for name in self.tensors):
            raise ValueError(f"{self.name} is a checkpoint, not a LoRA: put it in models/checkpoints")
        try:
            modules, others = lora_modules(self.lora)
            _ = self.told
        except ValueError as error:
            raise ValueError(f"{self.name} was not applied: {error}") from None
        if not modules:
            some = f"the first of its {len(others)} tensors is {others[0]}" if others else "it has no tensors"
            raise ValueError(f"{self.name} is not a LoRA: {some}")

    def base_model(self) -> str:
        """Name the kind of model that the file was made for: as its metadata say, or else as its names and shapes."""
        for key in ("modelspec.architecture", "ss_base_model_version"):
            if self.metadata.get(key):
                return self.metadata[key]
        for name, module in lora_modules(self.lora)[0].items():
            for mark, base in _BASE_BY_NAME.items():
                if mark in name:
                    return base
            if name.endswith("attn2_to_k"):
                width = module.shape[1]
                return _BASE_BY_CONTEXT_WIDTH.get(width, f"a model with cross-attention to {width} channels")
        return "a model of unknown kind"

    @cached_property
    def lora(self) -> Mapping[str, Tensor]:
        """The tensors of the LoRA."""
        return split_target_time(self.tensors)[0]

    @cached_property
    def target_time_shape(self) -> tuple[int, int] | None:
        """The channels and the width of the embedding of the target time, or None if there is none.

        Raises ValueError when it is damaged.
        """
        _, embedding = split_target_time(self.tensors)
        return shape_of(embedding) if embedding else None

    @cached_property
    def told(self) -> Told | None:
        """What of the target time the network is told, or None; raises ValueError when it is nothing known here."""
        return checked_told(self.metadata.get(_TOLD, "s")) if self.target_time_shape else None

    def alpha(self, path: str, rank: int) -> float | None:
        """Return the alpha that PEFT's settings in the metadata give a module without one of its own; None: unknown.

        Raises ValueError for settings that are not readable.
        """
        text = self.metadata.get(_ADAPTER)
        if text is None:
            return None
        try:
            config = _of_the_network(json.loads(text))
            return None if config is None else peft_alpha(config, path, rank)
        except ValueError as error:
            raise ValueError(f"{_ADAPTER} of {self.name} is damaged: {error}") from None

    def settings(self) -> Settings:
        """Return the recommended settings from the metadata tcd.steps, tcd.eta and tcd.cfg.

        Raises ValueError for one that is not a number, or is out of the range of the widget that it is meant for.
        """
        default = Settings()
        return Settings(
            int(self._number("tcd.steps", int, default.steps, low=1, high=50)),
            self._number("tcd.eta", float, default.eta, low=0, high=1),
            self._number("tcd.cfg", float, default.cfg, low=0, high=100),
        )

    def _number(self, key: str, kind: type[float], default: float, *, low: float, high: float) -> float:
        text = self.metadata.get(key)
        if text is None:
            return default
        label = f"{key} in the metadata of {self.name}"
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(f"{label} is {text!r}, but must be a number") from None
        check_range(label, value, low, high)
        return value


def _of_the_network(settings: Any) -> dict[str, Any] | None:
    """Return the settings of the network alone: diffusers writes them as unet.r, transformer.r, or just r."""
    if not isinstance(settings, dict):
        raise ValueError(f"it holds a {type(settings).__name__}, but must be an object")
    for prefix in ("unet.", "transformer.", ""):
        if f"{prefix}lora_alpha" in settings:
            return {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    return None
