"""Distill LoRAs for the tiny model; the settings that are not a method's own are the same for all methods."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import settings as config
from ..run import run
from ..tiny import world

TEACHER_GUIDANCE = 1.5
EMA_DECAY, HUBER_C = 0.95, 0.03
PLAIN = {"target_time": False, "weighting": "none", "diagonal": 0.0, "to_clean": 0.0}  # what a method adds to
PICTURES = 1024
BATCH = 32


def write_pictures(shared: Path) -> None:
    """Write the pictures and captions that `distill` trains on, if they are not there."""
    if not (shared / "pictures").exists():
        unfinished = shared / "pictures.unfinished"
        world.write_folder(unfinished, PICTURES, seed=0)
        unfinished.rename(shared / "pictures")


def distill(
    method: Mapping[str, Any], out: Path, *, shared: Path, lr: float, steps: int, seed: int, name: str = "lora"
) -> Path:
    """Distill the tiny model as `tcd-train run` does, or find the finished result; return the path of the LoRA file.

    method: the settings of the section [method] that differ from the common ones. shared: a folder with the pictures,
    in which the cache is kept.
    """
    settings = config.from_mapping(
        {
            "base": {"path": "tiny"},
            "data": {
                "folder": str(shared / "pictures"),
                "resolution": world.SIZE_PX,
                "cache": str(shared / "cache"),
            },
            "method": {
                **PLAIN,
                "guidance_min": TEACHER_GUIDANCE,
                "guidance_max": TEACHER_GUIDANCE,
                "ema_decay": EMA_DECAY,
                "huber_c": HUBER_C,
                **method,
            },
            "adapter": {"rank": 32, "alpha": 32.0},
            "training": {"steps": steps, "batch": BATCH, "lr": lr, "warmup_steps": min(10, steps - 1), "seed": seed},
            "output": {"folder": str(out), "name": name},
        }
    )
    return settings.lora_path if settings.lora_path.exists() else run(settings)
