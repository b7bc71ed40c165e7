"""A tiny model with random weights, written and read as files: what the trainer's tests train on."""

from collections.abc import Sequence
from pathlib import Path

import torch

from plain_method import PLAIN
from trajectory_consistency.tcd import AdapterWeights, TargetInput, timestep_grid
from trajectory_consistency.tcd.adapter import FILE, STUDENT
from trajectory_consistency.tcd.distill.order import Group
from trajectory_consistency.tcd.distill.sampling import Guidance, initial_noise, sample_latents
from trajectory_consistency.trainer.config import settings as config
from trajectory_consistency.trainer.data.buckets import Size
from trajectory_consistency.trainer.data.dataset import Dataset, Table, caption_of
from trajectory_consistency.trainer.files.adapter_weights import load_weights
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.framing import Framing
from trajectory_consistency.trainer.models.unet import families
from trajectory_consistency.trainer.models.unet.checkpoint import UNetCheckpoint
from trajectory_consistency.trainer.models.unet.model import UNetModel
from trajectory_consistency.trainer.tiny import teach, world


def write_base(path: Path, seed: int = 0) -> Path:
    """Write a whole single-file checkpoint of the tiny family, with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = families.empty_unet("tiny"), families.empty_vae("tiny"), families.empty_text_encoder("tiny")
    teach.write_checkpoint(path, *parts)
    return path


def write_inputs(folder: Path, pictures: int = 6) -> dict[str, dict[str, object]]:
    """Write a base and a folder of pictures; return the values of a small configuration that uses them."""
    world.write_folder(folder / "data", pictures, seed=0)
    return {
        "base": {"path": str(write_base(folder / "base.safetensors"))},
        "data": {"folder": str(folder / "data"), "resolution": 64, "cache": str(folder / "cache")},
        "method": dict(PLAIN),
        "adapter": {"rank": 4, "alpha": 2.0},
        "training": {"steps": 2, "batch": 3, "lr": 1e-3},
        "output": {"folder": str(folder / "out")},
    }


def model_of(path: Path, dtype: torch.dtype = torch.float32) -> UNetModel:
    """The network of a checkpoint on the CPU, as the trainer uses it."""
    return UNetCheckpoint(config.BaseConfig(path=str(path))).load(dtype, torch.device("cpu"))


def with_adapter(
    model: UNetModel,
    *,
    rank: int = 4,
    alpha: float = 4.0,
    seed: int = 0,
    targets: tuple[str, ...] = ("all",),
    target_input: TargetInput | None = None,
    effect: float = 0.0,
) -> AdapterWeights:
    """Add a student to a model; effect: the standard deviation of the noise added to its weights."""
    weights = model.new_weights(rank=rank, alpha=alpha, seed=seed, targets=targets, target_input=target_input)
    generator = torch.Generator().manual_seed(9)
    for parameter in weights.parameters() if effect else ():
        parameter.data += effect * torch.randn(parameter.shape, generator=generator)
    return model.adapter.add(STUDENT, weights)


def drawn_by_hand(
    base: config.BaseConfig,
    lora: Path | None,
    prompt: str,
    seed: int,
    *,
    steps: int,
    gamma: float,
    cfg: float,
    side: int,
) -> torch.Tensor:
    """The picture, uint8 [3, side, side], that a person gets who loads a base, and perhaps a LoRA file, and samples."""
    checkpoint, cpu = UNetCheckpoint(base), torch.device("cpu")
    model, text_encoder = checkpoint.load(torch.float32, cpu), checkpoint.load_text_encoder(cpu)
    if lora:
        model.adapter.add(FILE, load_weights(model, lora))
    (cond,), (uncond,) = (text_encoder.encode([text]) for text in (prompt, ""))
    latents = sample_latents(
        model,
        cond,
        sigmas=model.schedule.sigmas_at(",".join(map(str, timestep_grid(steps)))),
        gamma=gamma,
        noise=initial_noise(seed, (1, 4, side // 8, side // 8)),
        seed=seed,
        guidance=None if cfg == 1 else Guidance(uncond, cfg),
    )
    return checkpoint.load_autoencoder(cpu).decode(latents)[0]


def context(tensor: torch.Tensor) -> Conditioning:
    """Conditioning of text embeddings [B, 77, D] alone."""
    return Conditioning.of(context=tensor)


def small_config(values: dict[str, dict[str, object]], **training: object) -> config.Config:
    """A validated configuration of `values` with some of the training settings changed; its method begins as PLAIN."""
    method = {**PLAIN, **values.get("method", {})}
    return config.from_mapping({**values, "method": method, "training": {**values["training"], **training}})


def join_captions(captions: Sequence[Conditioning], framing: Framing) -> Conditioning:
    """Join rows as SD1.5 does, which does not get the framing."""
    return Conditioning.cat(captions)


def random_dataset() -> Dataset:
    """Six random latents [4, 8, 8], each with a random caption, and the empty caption, all in memory."""
    generator = torch.Generator().manual_seed(0)
    latents = {
        "mean": torch.randn((6, 4, 8, 8), generator=generator),
        "sizes": torch.tensor([64, 64, 0, 0, 64, 64]).expand(6, -1),
    }
    captions = {"context": torch.randn((7, 77, 32), generator=generator)}
    index = torch.tensor([(0, row, 0, row + 1) for row in range(6)])
    table = Table(index, [latents], [captions])
    return Dataset((Group(Size(64, 64), 6, 1.0),), [table], caption_of(captions, 0), join_captions)
