"""One process of tests/bench/host_step.py: a loop that trains a stand-in of a model family, a step for each line.

Arguments: a key of KINDS, the family, the folder of the stand-ins, and the rank. Prints JSON lines: for "step" the
seconds it took, for "peak" the peak of what torch allocates in a step, in bytes. Run by an interpreter with ComfyUI's
packages.

`ours` is the trainer's own loop, by the recipes' method; `kept` is the same with all activations kept, not recomputed.
`node` is the host's TrainLoraNode, with its defaults but for the dtype; `blocks` is the same with checkpoint_depth 2.
All compute a batch of two pictures one after the other: in a batch, the node would compute each picture with the
captions of all of them, and average.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from distill_loops import Pictures
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from trajectory_consistency.trainer.config.settings import from_mapping
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.models.comfy.conditioning import join, to_row
from trajectory_consistency.trainer.models.comfy.library import load_comfyui
from trajectory_consistency.trainer.run import load_student
from trajectory_consistency.trainer.training.loop import train
from trajectory_consistency.trainer.training.memory import _Allocations

sys.path.append(str(Path(__file__).resolve().parents[1] / "host" / "scripts"))

from families import FAMILIES, Family, written

BATCH, ENDLESS = 2, 100000


def ours(family: Family, path: Path, rank: int) -> None:
    """Train by the trainer, until the process ends."""
    import comfy.model_management

    config = from_mapping(
        {
            "base": family.base(path),
            "data": {"folder": "."},
            "method": {
                "target_time": True,
                "diagonal": 0.5,
                "to_clean": 0.15,
                "weighting": "x0",
                "ema_decay": 0.95,
                "guidance_min": 2.0,
                "guidance_max": 5.0,
            },
            "adapter": {"rank": rank, "alpha": float(rank)},
            "training": {"steps": ENDLESS, "batch": BATCH, "accumulate": BATCH},
            "output": {"folder": "."},
        }
    )
    checkpoint, device = open_checkpoint(config.base), comfy.model_management.get_torch_device()
    rows = [to_row(family.conditioning(seed)) for seed in range(BATCH + 1)]
    data = Pictures(latents_of(family), join(rows[1:]), join(rows[:1] * BATCH))
    train(load_student(config, checkpoint, device, torch.float32), data, config)  # type: ignore[arg-type]


def kept(family: Family, path: Path, rank: int) -> None:
    """Train by the trainer, with all activations kept; networks that work in place have no gradient then."""
    from trajectory_consistency.nodes.host.training import HostNetwork

    with mock.patch.object(HostNetwork, "enable_gradient_checkpointing", lambda _: None):
        ours(family, path, rank)


def node(family: Family, path: Path, rank: int, depth: int) -> None:
    """Train by the host's node until the process ends; depth: which parts it recomputes, 1 for the network as one."""
    from comfy_extras.nodes_train import TrainLoraNode

    latents = {"samples": latents_of(family)}
    captions = [family.conditioning(seed) for seed in range(1, BATCH + 1)]
    chosen = {"steps": ENDLESS, "rank": rank, "checkpoint_depth": depth, "grad_accumulation_steps": BATCH}
    chosen |= {"training_dtype": "fp32", "lora_dtype": "fp32", "existing_lora": "[None]"}
    defaults = {entry.id: getattr(entry, "default", None) for entry in TrainLoraNode.define_schema().inputs}
    inputs: dict[str, Any] = {name: [value] for name, value in (defaults | chosen).items()}
    model = family.load(path, dtype=torch.float32)
    TrainLoraNode.execute(**inputs | {"model": [model], "latents": [latents], "positive": captions})


def latents_of(family: Family) -> Tensor:
    return torch.randn(BATCH, *latent_shape(family), generator=torch.Generator().manual_seed(0))


def latent_shape(family: Family) -> tuple[int, ...]:
    """Return a larger shape than that of the tests, so that activations take the most memory."""
    *channels, height, width = family.latent
    scale = 4 if family is FAMILIES["sd15"] else 8  # a UNet has blocks at the resolution of the latent
    return (*channels, scale * height, scale * width)


def measured_steps() -> Iterator[None]:
    """Answer each line of the standard input by measuring what happens until the next value is asked for."""
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        if line.strip() == "step":
            began = time.perf_counter()
            yield
            print(json.dumps(time.perf_counter() - began), flush=True)
        else:
            with _Allocations([each for each in gc.get_objects() if issubclass(type(each), Tensor)]) as allocations:
                yield
            print(json.dumps(allocations.peak), flush=True)
    sys.exit()


KINDS = {"ours": ours, "node": partial(node, depth=1), "blocks": partial(node, depth=2), "kept": kept}


def main() -> None:
    kind, name, folder, rank = sys.argv[1:]
    load_comfyui()
    family, path = FAMILIES[name], written(name, Path(folder))
    steps = measured_steps()
    next(steps)
    # Both loops run as a whole, and wait after each step of their optimizer.
    register_optimizer_step_post_hook(lambda *_: next(steps))
    KINDS[kind](family, path, int(rank))


if __name__ == "__main__":
    main()
