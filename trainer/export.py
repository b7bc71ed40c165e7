"""Write the LoRA file, and prove that what was written is what was trained before it gets its name.

Flows in: a trained UNet.  Flows out: one .safetensors file in kohya's names, which ComfyUI and diffusers both read.
"""

from __future__ import annotations

import datetime
import hashlib
import os
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tcd import to_kohya
from trainer import adapter
from trainer.config import Config
from trainer.network import Network
from trainer.teacher import Base

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-2}


class ExportError(RuntimeError):
    """The written file does not give what the network in training gives; it was removed."""


def write_lora(path: Path, network: Network, config: Config, metadata: dict[str, str], context: Tensor) -> None:
    """Write the adapter of `network` to `path`, atomically, after reading it back and comparing one prediction.

    context: [1, 77, D], any caption, for that prediction.  Raises ExportError when the file's prediction differs from
    the trained one by more than rounding, or not at all from the base's.
    """
    dtype = getattr(torch, config.output.dtype)
    state = to_kohya(adapter.adapter_state(network.unet), config.adapter.alpha)
    state = {key: value.to("cpu", dtype).contiguous() for key, value in state.items()}
    unfinished = path.with_name(f".{path.stem}.unfinished.safetensors")
    try:
        save_file(state, unfinished, metadata=metadata)
        os.chmod(unfinished, 0o644)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        _verify(unfinished, network, context, TOLERANCE[dtype])
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@torch.no_grad()
def _verify(path: Path, network: Network, context: Tensor, tolerance: float) -> None:
    """Read the file with diffusers' own loader, as a second adapter on the same frozen base, and compare."""
    unet = network.unet
    trained = _probe(network, context)
    with adapter.adapters_off(unet):
        base = _probe(network, context)
    with adapter.second_adapter(unet, path):
        written = _probe(network, context)
    error = ((written - trained).norm() / trained.norm()).item()
    effect = ((written - base).norm() / base.norm()).item()
    if not error <= tolerance:
        raise ExportError(f"the written LoRA predicts {error:.2e} away from the trained one (allowed: {tolerance:.0e})")
    if effect == 0:
        raise ExportError("the written LoRA changes nothing: its prediction is the base model's")


def _probe(network: Network, context: Tensor) -> Tensor:
    """One prediction, always at the same noise and timestep."""
    size = network.unet.config.sample_size
    x_t = torch.randn((1, 4, size, size), generator=torch.Generator().manual_seed(0)).to(context.device)
    return network.x0(x_t, torch.tensor([499], device=context.device), context)


def describe(config: Config, base: Base, source: Path) -> dict[str, str]:
    """The file's metadata: what other tools read (modelspec, ss_*), and what TCD's own settings were (tcd.*)."""
    method, output = config.method, config.output
    predicted = {"eps": "epsilon", "v": "v", "x0": "sample", "flow": "flow"}[base.prediction]
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora" if base.family == "sd15" else f"{base.family}-sd/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": output.name,
        "modelspec.date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "modelspec.prediction_type": predicted,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.adapter.rank),
        "ss_network_alpha": str(config.adapter.alpha),
        "ss_base_model_version": "sd_v1" if base.family == "sd15" else f"{base.family}_sd",
        "tcd.version": version("trajectory-consistency"),
        "tcd.method": "tcd" if method.law == "uniform" else "lcm",
        "tcd.law": method.law,
        "tcd.grid": str(method.origin_steps),
        "tcd.skip": str(method.skip),
        "tcd.guidance_min": str(method.guidance_min),
        "tcd.guidance_max": str(method.guidance_max),
        "tcd.prediction_type": base.prediction,
        "tcd.target_time": "none",
        "tcd.steps": str(output.steps),
        "tcd.eta": str(output.eta),
        "tcd.cfg": str(output.cfg),
        "tcd.config_sha256": hashlib.sha256(config.to_toml().encode()).hexdigest(),
    }
    if source.is_file():
        metadata["ss_sd_model_name"] = source.name
        metadata["ss_sd_model_hash"] = _short_hash(source)
    return metadata


def _short_hash(path: Path) -> str:
    """The short model hash by which web interfaces know a checkpoint: of 64 KiB from the second MiB on."""
    with open(path, "rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
