"""A tiny model with random weights, written and read as files: what the trainer's tests train on."""

from pathlib import Path

import torch

from trainer import bases, config
from trainer.network import Network
from trainer.teacher import load_base
from trainer.tiny import teach, world


def write_base(path: Path) -> Path:
    """Write a whole single-file checkpoint of the tiny family, with weights of seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = bases.empty_unet("tiny"), bases.empty_vae("tiny"), bases.empty_text_encoder("tiny")
    teach.write_checkpoint(path, *parts)
    return path


def write_inputs(folder: Path, pictures: int = 6) -> dict[str, dict[str, object]]:
    """Write a base and a folder of pictures; return the values of a small configuration that uses them."""
    world.write_folder(folder / "data", pictures, seed=0)
    return {
        "base": {"path": str(write_base(folder / "base.safetensors"))},
        "data": {"folder": str(folder / "data"), "resolution": 64},
        "adapter": {"rank": 4, "alpha": 2.0},
        "training": {"steps": 2, "batch": 3, "lr": 1e-3},
        "output": {"folder": str(folder / "out")},
    }


def network(path: Path) -> Network:
    """The UNet of a checkpoint, as the trainer uses it."""
    base = load_base(str(path))
    return Network(base.unet, base.alpha_bar.float(), base.prediction)


def small_config(values: dict[str, dict[str, object]], **training: object) -> config.Config:
    """A validated configuration of `values` with some of the training settings changed."""
    return config.from_mapping({**values, "training": {**values["training"], **training}})
