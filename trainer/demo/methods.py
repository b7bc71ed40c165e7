"""The methods that the demo compares, and sampling with each of them from the same captions and noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...tcd.adapter import OFF
from ...tcd.distill.sampling import Guidance, initial_noise, sample_latents
from ..config.base import BaseConfig
from ..files.adapter_weights import load_weights
from ..models import open_checkpoint
from ..models.framing import Framing
from ..tiny.world import SIZE_PX
from .distill import TEACHER_GUIDANCE

_BATCH = 64


@dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    label: str
    adapter: str | None
    """Name of a LoRA; None for the teacher."""
    steps: int
    """Sampling steps."""
    gamma: float
    """Amount of fresh noise per step, in [0, 1]."""

    @property
    def detail(self) -> str:
        """The sampling parameter that is not in the label."""
        return f"guidance {TEACHER_GUIDANCE:g}" if self.adapter is None else f"gamma {self.gamma:g}"


def _rows(label: str, adapter: str | None, gamma: float, *numbers: int) -> list[Method]:
    return [Method(f"{label}, {steps} step{'s' if steps > 1 else ''}", adapter, steps, gamma) for steps in numbers]


METHODS = (
    *_rows("Teacher", None, 0.0, 50, 4),
    *_rows("LCM", "lcm", 1.0, 1, 2, 4, 8, 32),
    *_rows("TCD", "tcd", 0.3, 1, 2, 4, 8, 32),
    *_rows("TCD S+", "target-time", 0.0, 1, 2, 4, 8, 32),
)
"""S+ is the variant in which the network gets the target time: TCF(S+) of arXiv 2402.19159."""
COMFY_METHODS = [method for method in METHODS if method.adapter == "target-time" and method.steps <= 4]
"""Methods that are also sampled in ComfyUI."""


def noise_for(seed: int, count: int) -> Tensor:
    """Return initial noise [count, 4, h, w], with row k as ComfyUI draws it for a single picture with seed + k."""
    side = SIZE_PX // 8
    return torch.cat([initial_noise(seed + k, (1, 4, side, side)) for k in range(count)])


class DemoSampler:
    """The tiny model with several LoRAs and the encoded captions."""

    def __init__(self, loras: dict[str, Path], captions: Sequence[str]) -> None:
        """loras: LoRA files by name. Raises UserError if a file is damaged or not a LoRA for the tiny model."""
        cpu = torch.device("cpu")
        checkpoint = open_checkpoint(BaseConfig(path="tiny"))
        self.autoencoder = checkpoint.load_autoencoder(cpu)
        self.model = checkpoint.load(torch.float32, cpu)
        for name, path in loras.items():
            self.model.adapter.add(name, load_weights(self.model, path))
        *cond, uncond = checkpoint.load_text_encoder(cpu).encode([*captions, ""])
        self.cond = checkpoint.collate(cond, Framing.whole(SIZE_PX, SIZE_PX, len(cond)))
        empty = checkpoint.collate([uncond], Framing.whole(SIZE_PX, SIZE_PX))
        self.guidance = Guidance(empty, TEACHER_GUIDANCE)

    def latents(self, method: Method, count: int, seed: int) -> Tensor:
        """Sample the first `count` captions by a method; return normalized latents, float32 [count, 4, h, w]."""
        with self.model.adapter.using(method.adapter or OFF):
            return self._sample(method, count, seed, None if method.adapter else self.guidance)

    def pictures(self, method: Method, count: int, seed: int) -> Tensor:
        """Sample the first `count` captions by a method; return pictures, uint8 [count, 3, H, W]."""
        return self.autoencoder.decode(self.latents(method, count, seed))

    def _sample(self, method: Method, count: int, seed: int, guidance: Guidance | None) -> Tensor:
        noise, sigmas = noise_for(seed, count), self.model.schedule.sigmas_for(method.steps)
        parts = []
        for start in tqdm(range(0, count, _BATCH), desc=method.label.rjust(18), unit="batch"):
            rows = slice(start, min(start + _BATCH, count))
            parts.append(
                sample_latents(
                    self.model,
                    self.cond[rows],
                    sigmas=sigmas,
                    gamma=method.gamma,
                    noise=noise[rows],
                    seed=seed + start,  # so that picture k has the fresh noise of seed + k in any batch
                    guidance=guidance,
                )
            )
        return torch.cat(parts)
