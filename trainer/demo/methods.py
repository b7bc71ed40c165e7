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

from ...tcd.adapter import OFF
from ..config.settings import BaseConfig
from ..files.adapter_weights import load_weights
from ..models import open_checkpoint
from ..models.sampling import Guidance, initial_noise, sample_latents
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
    *_rows("TCD S+", "target-time", 0.3, 1, 2, 4, 8, 16),
)
"""S+ is the variant whose network gets the target time (TCF(S+) of arXiv 2402.19159)."""
IN_COMFY = [method for method in METHODS if method.adapter == "target-time" and method.steps <= 4]
"""Those that ComfyUI draws too."""


def noise_for(seed: int, count: int) -> Tensor:
    """Starting noise [count, 4, h, w] of which picture k is what ComfyUI would draw for it alone with seed + k."""
    side = SIZE_PX // 8
    return torch.cat([initial_noise(seed + k, (1, 4, side, side)) for k in range(count)])


class Studio:
    """The tiny base with its LoRAs, read from their files, and its captions encoded."""

    def __init__(self, loras: dict[str, Path], captions: Sequence[str]) -> None:
        """Load everything; raises UserError when a file is not what it should be."""
        cpu, sizes = torch.device("cpu"), torch.zeros(1, 6)
        checkpoint = open_checkpoint(BaseConfig(path="tiny"))
        self.autoencoder = checkpoint.load_autoencoder(cpu)
        self.model = checkpoint.load(torch.float32, cpu)
        for name, path in loras.items():
            self.model.adapter.add(name, load_weights(self.model, path))
        *cond, uncond = checkpoint.load_text_encoder(torch.float32, cpu).encode([*captions, ""])
        self.cond = checkpoint.collate(cond, sizes.expand(len(cond), -1))
        self.guidance = Guidance(uncond, TEACHER_GUIDANCE)

    def latents(self, method: Method, count: int, seed: int) -> Tensor:
        """Sample the first `count` captions by a method: normalized latents [count, 4, h, w]."""
        with self.model.adapter.using(method.adapter or OFF):
            return self._sample(method, count, seed, None if method.adapter else self.guidance)

    def pictures(self, method: Method, count: int, seed: int) -> Tensor:
        """Draw the first `count` captions by a method: uint8 [count, 3, H, W]."""
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
                    seed=seed + start,  # picture k draws its noise from seed + k, whatever the batch
                    guidance=guidance,
                )
            )
        return torch.cat(parts)
