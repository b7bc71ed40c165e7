"""Models of full size with random weights, made on the device: nothing is read, and nothing downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from distill_loops import Pictures
from measure import Bench
from torch import Tensor

from trajectory_consistency.trainer.config.base import BaseConfig
from trajectory_consistency.trainer.config.settings import Config, from_mapping
from trajectory_consistency.trainer.models.seam import Checkpoint
from trajectory_consistency.trainer.models.unet import checkpoint as unet_checkpoint
from trajectory_consistency.trainer.models.unet import families
from trajectory_consistency.trainer.models.unet.text import CLIPS, TextEncoder


class RandomSource:
    """A model of a family, in place of a file; its weights are made anew on each load."""

    path = Path("random")

    def __init__(self, family: families.Family, device: torch.device) -> None:
        self._family, self._device = family, device

    def family(self) -> families.Family:
        return self._family

    def distillation(self) -> str:
        return ""

    def prediction(self) -> tuple[str, str]:
        return "eps", "random"

    def zero_snr(self) -> bool:
        return False

    def check_encoders(self, **_: object) -> None:
        pass

    def unet(self, dtype: torch.dtype) -> Any:
        with self._device:
            return torch.nn.Module.to(families.empty_unet(self._family), dtype)

    def text_encoder(self) -> TextEncoder:
        with self._device:
            models = [families.empty_text_encoder(self._family, clip.part) for clip in CLIPS[self._family]]
        return TextEncoder(self._family, models)

    def vae(self, family: families.Family) -> Any:
        with self._device:
            return families.empty_vae(family)


def random_base(family: families.Family, device: torch.device) -> Checkpoint:
    """Return a model of a family with random weights."""
    with mock.patch.object(unet_checkpoint, "_open", lambda _: RandomSource(family, device)):
        return unet_checkpoint.UNetCheckpoint(BaseConfig(path="random"))


def config_of(
    side: int, batch: int, *, rank: int = 64, method: dict[str, Any] | None = None, **training: Any
) -> Config:
    """Return the settings of a run, by default with the recommended method."""
    return from_mapping(
        {
            "base": {"path": "random"},
            "data": {"folder": ".", "resolution": side},
            "method": method or {},
            "adapter": {"rank": rank, "alpha": float(rank)},
            "training": {"steps": 10000, "batch": batch, **training},
            "output": {"folder": "."},
        }
    )


def pictures(checkpoint: Checkpoint, side: int, batch: int) -> Pictures:
    """Return a data set of one batch of random latents and captions, on the CPU as a data set is."""
    cpu = torch.device("cpu")
    latents = torch.randn(batch, *checkpoint.latents.shape(side, side))
    cond, uncond = (checkpoint.placeholder_conditioning(batch, cpu).map(_random) for _ in range(2))
    return Pictures(latents, cond, uncond)


def _random(tensor: Tensor) -> Tensor:
    return torch.randn_like(tensor) if tensor.is_floating_point() else tensor


def side_of(bench: Bench, side: int) -> int:
    """Return the side of the pictures in pixels: 64 in a dry run."""
    return 64 if bench.dry else side


def sd15_of(bench: Bench) -> families.Family:
    """Return the family of SD1.5; in a dry run, that of the embedded tiny model."""
    return "tiny" if bench.dry else "sd15"
