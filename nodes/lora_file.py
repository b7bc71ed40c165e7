"""A LoRA file as it was read: what it was made for, and with which settings it is best used."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .ranges import check_range

_BASE_BY_CONTEXT_WIDTH = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}


class Settings(NamedTuple):
    """The settings that the maker of a LoRA recommends; as here, where the file does not say."""

    steps: int = 4
    eta: float = 0.3
    cfg: float = 1.0


@dataclass(frozen=True)
class LoraFile:
    """The tensors and the metadata of a LoRA file, under the name by which the host lists it."""

    name: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    def base_model(self) -> str:
        """Name the kind of model that the file was made for: as its metadata say, or else as its shapes tell."""
        for key in ("modelspec.architecture", "ss_base_model_version"):
            if self.metadata.get(key):
                return self.metadata[key]
        for name, tensor in self.tensors.items():
            if name.endswith("attn2_to_k.lora_down.weight") and tensor.ndim > 1:
                width = tensor.shape[1]
                return _BASE_BY_CONTEXT_WIDTH.get(width, f"a model with cross-attention to {width} channels")
        return "a model of unknown kind"

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
