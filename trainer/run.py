"""One run from configuration to LoRA file.

Flows in: a validated `Config`.  Flows out: `output.folder` with the LoRA, and the resolved configuration beside it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch

from trainer.adapter import add_adapter
from trainer.bases import Family
from trainer.conditioning import encode
from trainer.config import Config
from trainer.data import Dataset, Picture, encode_pictures, find_pictures
from trainer.errors import UserError
from trainer.export import describe, write_lora
from trainer.loop import train
from trainer.network import Network
from trainer.teacher import Base, identify, load_base, locate

CONFIG_NAME = "config.toml"
log = logging.getLogger("trajectory-consistency")


class Inputs(NamedTuple):
    """What a run reads, as far as it can be known without a model in memory."""

    family: Family
    pictures: list[Picture]


def check(config: Config) -> Inputs:
    """Look at everything that a run needs, and load no weights.

    Raises UserError for whatever would stop the run.
    """
    _device(config)
    _check_free(config)
    return Inputs(identify(config.base.path), find_pictures(config.data_folder))


def plan(config: Config, inputs: Inputs) -> str:
    """Say in words what a run would do."""
    training, method, pictures = config.training, config.method, inputs.pictures
    return "\n".join(
        [
            f"base      {config.base.path} ({inputs.family}), in {_dtype(config)} on {_device(config)}",
            f"data      {len(pictures)} captioned pictures in {config.data.folder}, at {config.data.resolution} px",
            f"method    law {method.law}, solver step {method.skip}, "
            f"guidance {method.guidance_min:g} to {method.guidance_max:g}",
            f"adapter   rank {config.adapter.rank}, alpha {config.adapter.alpha:g}",
            f"training  {training.steps} steps of {training.batch} pictures "
            f"({training.steps * training.batch / len(pictures):.1f} epochs), learning rate {training.lr:g}",
            f"output    {config.lora_path}",
        ]
    )


def run(config: Config) -> Path:
    """Distill, and return the LoRA file's path.

    Raises UserError for bad input, NonFiniteError when training diverges, ExportError when the file does not hold up.
    """
    inputs = check(config)
    log.info("%s", plan(config, inputs))
    device = _device(config)
    base = load_base(config.base.path, prediction=config.base.prediction, dtype=_dtype(config))
    metadata = describe(config, base, locate(config.base.path))
    dataset = _encode(base, inputs.pictures, config, device)
    network = Network(base.unet.to(device), base.alpha_bar.float().to(device), base.prediction)
    del base  # and with it the VAE and the text encoder
    seed = config.training.seed
    parameters = add_adapter(network.unet, rank=config.adapter.rank, alpha=config.adapter.alpha, seed=seed)
    _claim(config)
    train(network, parameters, dataset, config)
    write_lora(config.lora_path, network, config, metadata, dataset.contexts[-1:].to(device))
    log.info("wrote %s", config.lora_path)
    return config.lora_path


def _encode(base: Base, pictures: list[Picture], config: Config, device: torch.device) -> Dataset:
    """Latents and text embeddings of all pictures, computed on `device`."""
    text_encoder = base.text_encoder.to(device)
    return encode_pictures(
        pictures,
        vae=base.vae.to(device),
        encode_captions=lambda captions: encode(text_encoder, captions),
        resolution=config.data.resolution,
    )


def _check_free(config: Config) -> None:
    """Refuse an output folder that holds another run: a finished one, or one of other settings."""
    folder = config.output_folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output.folder is {folder}, which is a file: choose another")
    if config.lora_path.exists():
        raise UserError(f"{config.lora_path} exists: choose another output.folder or output.name, or remove it")
    other = folder / CONFIG_NAME
    if other.exists() and other.read_text(encoding="utf-8") != config.to_toml():
        raise UserError(f"{other} is of a run with other settings: choose another output.folder, or remove it")


def _claim(config: Config) -> None:
    """Write the resolved configuration into the output folder."""
    folder = config.output_folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(config.to_toml(), encoding="utf-8")


def _device(config: Config) -> torch.device:
    wanted = config.training.device
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise UserError(f"training.device is {wanted!r}, which cannot be used here: {error}") from error
    return device


def _dtype(config: Config) -> torch.dtype:
    if config.base.dtype == "auto":
        return torch.float32 if _device(config).type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, config.base.dtype)
    return dtype
