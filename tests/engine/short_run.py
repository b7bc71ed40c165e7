"""A short run of the trainer on a UNet, the same by each engine: its first gradient, and the LoRA at its end.

Run by an interpreter with diffusers, `python short_run.py FAMILY FOLDER`, it writes a base of random weights, and
trains it by the engine that needs diffusers. With `captions` in place of the family, it writes a text encoder of SD1.5,
and captions that were encoded by it.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trajectory_consistency.tcd import DiscreteSchedule, scaled_linear_alpha_bar
from trajectory_consistency.tcd.adapter import STUDENT
from trajectory_consistency.tcd.distill.order import Group
from trajectory_consistency.trainer.config.settings import Config, from_mapping
from trajectory_consistency.trainer.data.buckets import Size
from trajectory_consistency.trainer.data.dataset import Dataset, Join, Table, caption_of
from trajectory_consistency.trainer.files.adapter_weights import file_tensors, initial_weights
from trajectory_consistency.trainer.models.seam import Model
from trajectory_consistency.trainer.training.loop import Training

PICTURES, STEPS = 4, 6
WIDTHS = {"sd15": (768, 0), "sdxl": (2048, 1280)}
"""Of the captions' tokens, and of the pooled captions."""
BASE, TEXT_ENCODER, RESULT = "base.safetensors", "clip.safetensors", "result.safetensors"
CAPTIONS = ("", "a red circle left of a star, on a blue background", "an old photograph of a harbour at night")


def config_of(folder: Path) -> Config:
    """Return the configuration, with S+, a moving average, and a distance that magnifies no rounding."""
    return from_mapping(
        {
            "base": {"path": str(folder / BASE), "engine": "comfyui"},
            "data": {"folder": str(folder)},
            "method": {"target_time": True, "diagonal": 0.5, "skip": 100, "ema_decay": 0.9, "distance": "l2"},
            "adapter": {"rank": 2, "alpha": 2.0},
            "training": {"steps": STEPS, "batch": 2, "lr": 1e-3, "device": "cpu"},
            "output": {"folder": str(folder)},
        }
    )


def captions_of(family: str) -> tuple[Tensor, Tensor | None]:
    """Return encoded captions, [PICTURES + 1, 77, width], and pooled ones, of which the first is the empty caption."""
    generator = torch.Generator().manual_seed(1)
    tokens, pooled = WIDTHS[family]
    context = torch.randn(PICTURES + 1, 77, tokens, generator=generator)
    return context, torch.randn(PICTURES + 1, pooled, generator=generator) if pooled else None


def dataset_of(captions: dict[str, Tensor], join: Join) -> Dataset:
    """Return random latents of 64 x 64 pixels with these captions, whose names are the engine's."""
    latents = {
        "mean": torch.randn(PICTURES, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "sizes": torch.tensor([64, 64, 0, 0, 64, 64]).expand(PICTURES, -1),
    }
    table = Table(torch.tensor([(0, row, 0, row + 1) for row in range(PICTURES)]), [latents], [captions])
    groups = (Group(Size(64, 64), PICTURES, 1.0),)
    return Dataset(groups, [table], caption_of(captions, 0), join)


def run(model: Model, dataset: Dataset, config: Config) -> dict[str, Tensor]:
    """Train; return each tensor of the LoRA, by its key in the file, at the start and the end, and its gradient."""
    student = model.adapter.add(STUDENT, initial_weights(model, config))
    tensors = file_tensors(model, student)  # no copies, except for alpha
    keys = {tensor.data_ptr(): key for key, tensor in tensors.items()}
    found = {f"start.{key}": tensor.detach().clone() for key, tensor in tensors.items()}
    with Training(model, dataset, config) as training:
        for step in range(STEPS):
            training.train_step()
            if step == 0:
                moments: dict[Any, dict[str, Tensor]] = training.optimizer.state
                gradients = {keys[weight.data_ptr()]: moments[weight]["exp_avg"] for weight in training.parameters}
                found |= {f"gradient.{key}": moment.clone() for key, moment in gradients.items()}
    return found | {f"end.{key}": tensor.detach().clone() for key, tensor in file_tensors(model, student).items()}


def write_captions(folder: Path) -> None:
    """Write a text encoder of SD1.5 with random weights, and the captions as the engine of diffusers encodes them."""
    from trajectory_consistency.trainer.models.unet import families, ldm
    from trajectory_consistency.trainer.models.unet.text import CLIPS, TextEncoder

    torch.manual_seed(0)
    model = families.empty_text_encoder("sd15").eval()
    tensors = model.state_dict()
    locations = CLIPS["sd15"][0].locations(tensors, "text_model.")
    save_file({name: each.contiguous() for name, each in ldm.to_ldm(tensors, locations).items()}, folder / TEXT_ENCODER)
    encoded = TextEncoder("sd15", [model]).encode(CAPTIONS)
    save_file({str(row): each.tensors["context"] for row, each in enumerate(encoded)}, folder / RESULT)


def write_run(family: str, folder: Path) -> None:
    """Write a base and the result of the engine that needs diffusers, which itself opens no networks so small."""
    sys.path.append(str(Path(__file__).parents[1] / "host"))
    import checkpoints

    from trajectory_consistency.trainer.models.unet.checkpoint import UNetCheckpoint
    from trajectory_consistency.trainer.models.unet.model import UNetModel

    unet = {"sd15": checkpoints.sd15_unet, "sdxl": checkpoints.sdxl_unet}[family]()
    {"sd15": checkpoints.write_sd15_mini, "sdxl": checkpoints.write_sdxl_mini}[family](folder / BASE, unet)
    context, pooled = captions_of(family)
    captions = {"context": context} | ({} if pooled is None else {"pooled": pooled})
    model = UNetModel(unet, DiscreteSchedule.from_alpha_bar(scaled_linear_alpha_bar()), "eps")
    dataset = dataset_of(captions, partial(UNetCheckpoint.collate, None))
    save_file(run(model, dataset, config_of(folder)), folder / RESULT)


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, target = sys.argv[1], Path(sys.argv[2])
    write_captions(target) if kind == "captions" else write_run(kind, target)
