"""A training step on ComfyUI's models: a Flux and a Wan of billions of parameters, in bfloat16 and in 8 bits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from distill_loops import Pictures
from families import FAMILIES, Family
from measure import Bench, count_flops
from safetensors.torch import save_file

from trajectory_consistency.trainer.config.settings import Config, from_mapping
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.models.comfy.conditioning import join, to_row
from trajectory_consistency.trainer.models.comfy.library import load_comfyui
from trajectory_consistency.trainer.run import load_student
from trajectory_consistency.trainer.training.loop import Training
from trajectory_consistency.trainer.training.memory import MemorySettings, estimate_training

FLOAT8 = torch.float8_e4m3fn


def large_families() -> dict[str, Family]:
    """Return a Flux of 2.6 B parameters at 1024 px, and a Wan of the size of 1.3B with 5 latent frames at 480 px."""
    flux, wan = FAMILIES["flux"], FAMILIES["wan"]
    flux_build = partial(flux.build, hidden_size=3072, num_heads=24, depth=4, depth_single_blocks=8)
    wan_build = partial(wan.build, dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
    return {
        "flux 2.6 B": replace(flux, build=flux_build, latent=(16, 128, 128), context=(512, 4096)),
        "wan 1.3 B": replace(wan, build=wan_build, latent=(16, 5, 60, 104), context=(512, 4096)),
    }


def run(bench: Bench) -> None:
    """Measure every family in both formats of its weights."""
    load_comfyui()
    families = {"flux": FAMILIES["flux"], "wan": FAMILIES["wan"]} if bench.dry else large_families()
    with TemporaryDirectory() as folder:
        for name, family in families.items():
            for dtype in (bench.dtype, FLOAT8):
                label = f"{name}, {str(dtype).removeprefix('torch.')}"
                with bench.case(label) as has_time:
                    if has_time:
                        path = _written(bench, family, Path(folder), dtype)
                        _measure(bench, label, family, path)
                        path.unlink()


def _written(bench: Bench, family: Family, folder: Path, dtype: torch.dtype) -> Path:
    """Write a family's network with random weights; in 8 bits, its matrices only."""
    import comfy.ops

    network = family.build(dtype=bench.dtype, device=bench.device, operations=comfy.ops.disable_weight_init)
    state: dict[str, Any] = {}
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            scale = value[0].numel() ** -0.5 if value.ndim > 1 else 1.0
            value = torch.randn_like(value) * scale
            value = value.to(dtype) if value.ndim == 2 else value
        state[family.prefix + name] = value.cpu().contiguous()
    path = folder / "network.safetensors"
    save_file(state, path)
    return path


def _measure(bench: Bench, label: str, family: Family, path: Path) -> None:
    config = _config(family, path, str(bench.device))
    checkpoint: Any = open_checkpoint(config.base)
    checkpoint.__dict__["_long_caption"] = to_row(family.conditioning(0))  # in place of the text encoder's
    rows = [to_row(family.conditioning(seed)) for seed in range(2)]
    data = Pictures(torch.randn(1, *family.latent), join(rows[:1]), join(rows[1:]))
    student = load_student(config, checkpoint, bench.device, bench.dtype)
    training = Training(student, data, config)  # type: ignore[arg-type]
    timed = bench.time(training.train_step, 1 if bench.dry else 4, warm_up=1)
    side = 8 * family.latent[-1]
    settings = MemorySettings.from_config(config, bench.dtype)._replace(width=side, height=8 * family.latent[-2])
    estimate = estimate_training(checkpoint, settings)
    # Recomputation repeats the forward pass of the student, so the utilisation is higher than what is counted as work.
    flops = count_flops(training.train_step, 1 if bench.dry else 2)
    figures = {**bench.figures(timed, 1, flops), "estimated GB": round(estimate.total / 1e9, 3)}
    bench.keep(label, {**figures, "file GB": round(path.stat().st_size / 1e9, 3)})


def _config(family: Family, path: Path, device: str) -> Config:
    return from_mapping(
        {
            "base": family.base(path),
            "data": {"folder": ".", "resolution": 64},
            "adapter": {"rank": 16, "alpha": 16.0},
            "training": {"steps": 10000, "batch": 1, "device": device},
            "output": {"folder": "."},
        }
    )
