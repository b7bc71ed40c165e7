"""A tiny model with random weights, written and read as files: what the trainer's tests train on."""

from pathlib import Path

import torch

from trajectory_consistency.trainer.config import settings as config
from trajectory_consistency.trainer.data.buckets import Size
from trajectory_consistency.trainer.data.dataset import Dataset, Table, caption_of
from trajectory_consistency.trainer.data.order import Group
from trajectory_consistency.trainer.models.unet import families as bases
from trajectory_consistency.trainer.models.unet.network import Network
from trajectory_consistency.trainer.models.unet.teacher import load_base
from trajectory_consistency.trainer.tiny import teach, world


def write_base(path: Path, seed: int = 0) -> Path:
    """Write a whole single-file checkpoint of the tiny family, with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = bases.empty_unet("tiny"), bases.empty_vae("tiny"), bases.empty_text_encoder("tiny")
    teach.write_checkpoint(path, *parts)
    return path


def write_inputs(folder: Path, pictures: int = 6) -> dict[str, dict[str, object]]:
    """Write a base and a folder of pictures; return the values of a small configuration that uses them."""
    world.write_folder(folder / "data", pictures, seed=0)
    return {
        "base": {"path": str(write_base(folder / "base.safetensors"))},
        "data": {"folder": str(folder / "data"), "resolution": 64, "cache": str(folder / "cache")},
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


def random_dataset() -> Dataset:
    """Six random latents [4, 8, 8], each with a random caption, and the empty caption, all in memory."""
    generator = torch.Generator().manual_seed(0)
    latents = {
        "mean": torch.randn((6, 4, 8, 8), generator=generator),
        "time_ids": torch.tensor([64, 64, 0, 0, 64, 64]).expand(6, -1),
    }
    captions = {"context": torch.randn((7, 77, 32), generator=generator)}
    index = torch.tensor([(0, row, 0, row + 1) for row in range(6)])
    table = Table(index, [latents], [captions])
    return Dataset((Group(Size(64, 64), 6, 1.0),), [table], caption_of(captions, 0))
