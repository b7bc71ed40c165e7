"""What the demo compares: ways to draw the same captions from the same noise.

Flows in: the tiny base and LoRA files.  Flows out: pictures, by method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...tcd import timestep_grid
from ..models.sampling import Guidance, decode, initial_noise, sample_latents
from ..models.unet.adapter import adapters_off, load_adapter, use_adapter
from ..models.unet.network import Network
from ..models.unet.teacher import load_base, load_encoders
from ..tiny.world import SIZE_PX

TEACHER_GUIDANCE = 2.0
_BATCH = 64


@dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    label: str
    adapter: str | None
    """The name of a LoRA, or None for the teacher."""
    steps: int
    gamma: float

    @property
    def detail(self) -> str:
        """What else a reader must know to draw the row again."""
        return f"guidance {TEACHER_GUIDANCE:g}" if self.adapter is None else f"gamma {self.gamma:g}"


def _rows(label: str, adapter: str | None, gamma: float, *several: int) -> list[Method]:
    return [Method(f"{label}, {steps} step{'s' if steps > 1 else ''}", adapter, steps, gamma) for steps in several]


METHODS = (
    *_rows("Teacher", None, 0.0, 50, 4),
    *_rows("LCM", "lcm", 1.0, 1, 4, 16),
    *_rows("TCD", "tcd", 0.3, 1, 4, 16),
    *_rows("TCD S+", "told", 0.3, 1, 2, 4, 8, 16),
)
"""S+ is the variant whose network is told the target time (TCF(S+) of arXiv 2402.19159)."""
IN_COMFY = [method for method in METHODS if method.adapter == "told" and method.steps <= 4]
"""Those that ComfyUI draws too."""


def noise_for(seed: int, count: int) -> Tensor:
    """Starting noise [count, 4, h, w] of which picture k is what ComfyUI would draw for it alone with seed + k."""
    side = SIZE_PX // 8
    return torch.cat([initial_noise(seed + k, (1, 4, side, side)) for k in range(count)])


class Studio:
    """The tiny base with its LoRAs, read from their files, and its captions encoded."""

    def __init__(self, loras: dict[str, Path], captions: Sequence[str]) -> None:
        """Load everything; raises UserError when a file is not what it should be."""
        base, encoders = load_base("tiny"), load_encoders("tiny")
        self.vae = encoders.vae
        self.network = Network(base.unet, base.alpha_bar.float(), base.prediction)
        for name, path in loras.items():
            load_adapter(base.unet, path, name)
        self.cond = encoders.encode(captions)
        self.guidance = Guidance(encoders.encode([""]), TEACHER_GUIDANCE)

    def latents(self, method: Method, count: int, seed: int) -> Tensor:
        """Sample the first `count` captions by a method: scaled latents [count, 4, h, w]."""
        if method.adapter is None:
            with adapters_off(self.network.unet):
                return self._sample(method, count, seed, self.guidance)
        use_adapter(self.network.unet, method.adapter)
        return self._sample(method, count, seed, None)

    def pictures(self, method: Method, count: int, seed: int) -> Tensor:
        """Draw the first `count` captions by a method: uint8 [count, 3, H, W]."""
        return decode(self.vae, self.latents(method, count, seed))

    def _sample(self, method: Method, count: int, seed: int, guidance: Guidance | None) -> Tensor:
        noise, timesteps = noise_for(seed, count), timestep_grid(method.steps)
        parts = []
        for start in tqdm(range(0, count, _BATCH), desc=method.label.rjust(18), unit="batch"):
            rows = slice(start, start + _BATCH)
            parts.append(
                sample_latents(
                    self.network,
                    self.cond[:count][rows],
                    timesteps=timesteps,
                    gamma=method.gamma,
                    noise=noise[rows],
                    seed=seed + start,  # picture k draws its noise from seed + k, whatever the batch
                    guidance=guidance,
                )
            )
        return torch.cat(parts)
