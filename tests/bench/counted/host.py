"""Counts steps of ComfyUI's models in full size, and prints them as JSON. Run by an interpreter with its packages.

The files are sparse: they have a header, and no weights on the disk.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

TESTS = Path(__file__).parents[2]
FOLDERS = ("bench", "bench/gpu", ".", "host/scripts", "host/packs")
sys.path[:0] = [str(TESTS / folder) for folder in FOLDERS]

from families import FAMILIES, Family  # noqa: E402
from part_host import FLOAT8, large_families  # noqa: E402
from steps import DTYPE, META, count_step, figures_of  # noqa: E402

from trajectory_consistency.trainer.config.settings import from_mapping  # noqa: E402
from trajectory_consistency.trainer.models import open_checkpoint  # noqa: E402
from trajectory_consistency.trainer.models.comfy.conditioning import join, to_row  # noqa: E402
from trajectory_consistency.trainer.models.comfy.library import load_comfyui  # noqa: E402
from trajectory_consistency.trainer.training.memory import MemorySettings, estimate_training  # noqa: E402

NAMES = {torch.bfloat16: "BF16", FLOAT8: "F8_E4M3"}


def full_size() -> dict[str, tuple[Family, int, torch.dtype]]:
    """Return each model in full size, with the rank of its recipe, and the dtype of its file's matrices."""
    large = large_families()
    flux_dev = replace(large["flux 2.6 B"], build=partial(large["flux 2.6 B"].build, depth=19, depth_single_blocks=38))
    wan = replace(large["wan 1.3 B"], latent=(16, 1, 80, 80))
    z_image = replace(FAMILIES["z-image"], build=_z_image, latent=(16, 128, 128), context=(256, 2560))
    qwen_image = replace(FAMILIES["qwen-image"], build=_qwen_image, latent=(16, 1, 128, 128), context=(256, 3584))
    return {
        "Flux.1 dev": (flux_dev, 16, DTYPE),
        "Flux.1 dev, 8 bits": (flux_dev, 16, FLOAT8),
        "Z-Image": (z_image, 32, DTYPE),
        "Qwen-Image, 8 bits": (qwen_image, 16, FLOAT8),
        "Wan 2.1 1.3B, one frame": (wan, 64, DTYPE),
    }


def _z_image(**settings: Any) -> torch.nn.Module:
    from comfy.ldm.lumina.model import NextDiT
    from lent_models.small_networks import Z_IMAGE

    full = {"dim": 3840, "cap_feat_dim": 2560, "n_layers": 30, "n_heads": 30, "n_kv_heads": 30}
    return NextDiT(**{**Z_IMAGE, **full}, **settings)


def _qwen_image(**settings: Any) -> torch.nn.Module:
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(in_channels=64, num_layers=60, **settings)


def stand_ins() -> dict[str, tuple[Family, int, torch.dtype]]:
    """Return small models, for a test."""
    return {"Flux, 8 bits": (FAMILIES["flux"], 2, FLOAT8)}


def write_sparse(network: torch.nn.Module, matrices: torch.dtype, prefix: str, path: Path) -> None:
    """Write the header of a safetensors file, and a hole in place of the weights; matrices: the dtype of those."""
    header, end = {}, 0
    for name, value in network.state_dict().items():
        dtype = matrices if value.ndim == 2 else DTYPE
        size = value.numel() * dtype.itemsize
        header[prefix + name] = {
            "dtype": NAMES[dtype],
            "shape": list(value.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def steps(size: str) -> Iterator[dict[str, Any]]:
    """Give the figures of each model, one picture a step."""
    load_comfyui()
    import comfy.ops  # only now, because ComfyUI chooses its device when it is imported

    with TemporaryDirectory() as folder:
        for name, (family, rank, dtype) in {"full": full_size, "tiny": stand_ins}[size]().items():
            path = Path(folder) / "network.safetensors"
            network = family.build(dtype=DTYPE, device=META, operations=comfy.ops.disable_weight_init)
            write_sparse(network, dtype, family.prefix, path)
            config = from_mapping(
                {
                    "base": family.base(path),
                    "data": {"folder": "."},
                    "adapter": {"rank": rank, "alpha": float(rank)},
                    "training": {"batch": 1, "device": "cpu"},
                    "output": {"folder": "."},
                }
            )
            checkpoint: Any = open_checkpoint(config.base)
            caption = to_row(family.conditioning(0))
            checkpoint.__dict__["_long_caption"] = caption  # in place of the text encoder's
            height, width = (checkpoint.latents.stride * cells for cells in family.latent[-2:])
            settings = MemorySettings.from_config(config, DTYPE)._replace(width=width, height=height)
            counted = count_step(checkpoint, config, (width, height), join([caption]).to(META))
            yield figures_of(
                f"{name}, {width} px", counted, 1, estimate_training(checkpoint, settings), recomputed=True
            )


if __name__ == "__main__":
    print(json.dumps(list(steps(sys.argv[1]))))
