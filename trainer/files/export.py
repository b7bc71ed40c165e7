"""Write the LoRA file, and prove that what was written is what was trained before it gets its name.

Flows in: a trained UNet.  Flows out: one .safetensors file in kohya's names, which ComfyUI and diffusers both read.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..atomic import whole_file
from ..config.settings import Config
from ..errors import RunError
from ..models.conditioning import Conditioning
from ..models.unet import adapter
from ..models.unet.network import Network
from ..models.unet.teacher import Base
from .adapter_file import TOLD

_METHODS = {"uniform": "tcd", "zero": "lcm", "segment": "tscd", "phase": "pcm", "target": "tdd"}
log = logging.getLogger("trajectory-consistency")
CONFIG_DIGEST = "tcd.config_sha256"
"""In the metadata: which configuration the LoRA is of."""
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-2}


class ExportError(RunError):
    """The written file does not give what the network in training gives; it was removed."""


def write_lora(
    path: Path,
    network: Network,
    config: Config,
    metadata: dict[str, str],
    cond: Conditioning,
    *,
    final: bool = False,
) -> None:
    """Write the adapter of `network` to `path`, atomically, after reading it back and comparing one prediction.

    cond: one row, any caption, for that prediction.  final: whether it is what the run is for; what is written on the
    way may change nothing yet, as it does after a few small steps, and is warned of.  Raises ExportError when the
    file's prediction differs from the trained one by more than rounding or, if `final`, not at all from the base's.
    """
    dtype = getattr(torch, config.output.dtype)
    state = adapter.file_tensors(network.unet, config.adapter.alpha)
    state = {key: value.to("cpu", dtype).contiguous() for key, value in state.items()}
    with whole_file(path) as unfinished:
        save_file(state, unfinished, metadata=metadata)
        effect = _verify(unfinished, network, cond, max(TOLERANCE[dtype], _rounding(network, cond)))
        if effect == 0 and final:
            raise ExportError(
                "the written LoRA changes nothing: its prediction is the base model's; use a larger training.lr, or "
                "more training.steps"
            )
    if effect == 0:
        log.warning("%s changes nothing yet: its prediction is the base model's", path)


@torch.no_grad()
def _verify(path: Path, network: Network, cond: Conditioning, tolerance: float) -> float:
    """Read the file with diffusers' own loader, as a second adapter on the same frozen base, and compare.

    Return by how much it changes the base's prediction, relative to that.
    """
    unet = network.unet
    trained = _probe(network, cond)
    with adapter.adapters_off(unet):
        base = _probe(network, cond)
    with adapter.second_adapter(unet, path):
        written = _probe(network, cond)
    error = ((written - trained).norm() / trained.norm()).item()
    effect: float = ((written - base).norm() / base.norm()).item()
    if not error <= tolerance:
        raise ExportError(f"the written LoRA predicts {error:.2e} away from the trained one (allowed: {tolerance:.0e})")
    return effect


@torch.no_grad()
def _rounding(network: Network, cond: Conditioning) -> float:
    """What a change that means nothing may do to a prediction, relative to it: nothing in a base of float32.

    In half precision the least change of an adapter, or of x_t, is answered with as much as the rounding of all layers
    together, which is more the deeper the network is.
    """
    dtype = network.unet.dtype
    if dtype not in TOLERANCE:
        return 0.0
    plain, nudged = _probe(network, cond), _probe(network, cond, scale=1 + torch.finfo(dtype).eps / 8)
    return max(TOLERANCE[dtype], 2 * ((nudged - plain).norm() / plain.norm()).item())


def _probe(network: Network, cond: Conditioning, scale: float = 1.0) -> Tensor:
    """One prediction, always at the same noise, times `scale`, and timesteps."""
    device = cond.context.device
    x_t = scale * torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0)).to(device)  # proves as much
    t, s = torch.tensor([[499], [259]], device=device)
    return network.x0(x_t, t, cond, s)


def describe(config: Config, base: Base, source: Path) -> dict[str, str]:
    """The file's metadata: what other tools read (modelspec, ss_*), and what TCD's own settings were (tcd.*)."""
    method, output = config.method, config.output
    predicted = {"eps": "epsilon", "v": "v", "x0": "sample", "flow": "flow"}[base.prediction]
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{_architecture(base)}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": output.name,
        "modelspec.date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "modelspec.prediction_type": predicted,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.adapter.rank),
        "ss_network_alpha": str(config.adapter.alpha),
        "ss_base_model_version": _kohya_version(base),
        "ss_v2": str(base.family == "sd2"),
        "ss_zero_terminal_snr": str(base.alpha_bar[-1].item() == 0),
        "tcd.version": version("trajectory-consistency"),
        "tcd.method": _METHODS[method.law],
        "tcd.law": method.law,
        "tcd.grid": str(method.origin_steps),
        "tcd.skip": str(method.skip),
        "tcd.guidance_min": str(method.guidance_min),
        "tcd.guidance_max": str(method.guidance_max),
        "tcd.prediction_type": base.prediction,
        TOLD: method.told if method.target_time else "none",
        "tcd.steps": str(output.steps),
        "tcd.eta": str(output.eta),
        "tcd.cfg": str(output.cfg),
        CONFIG_DIGEST: config_digest(config),
    }
    if source.is_file():
        metadata["ss_sd_model_name"] = source.name
        metadata["ss_sd_model_hash"] = _short_hash(source)
    return metadata


def config_digest(config: Config) -> str:
    """The SHA-256 of a configuration as `config.toml` has it."""
    return hashlib.sha256(config.to_toml().encode()).hexdigest()


def _architecture(base: Base) -> str:
    """The base's name in the model specification of Stability AI."""
    if base.family == "sd2":
        return "stable-diffusion-v2-768-v" if base.prediction == "v" else "stable-diffusion-v2-512"
    return {"sd15": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}.get(base.family, f"{base.family}-sd")


def _kohya_version(base: Base) -> str:
    """The base's name among kohya's."""
    if base.family == "sd2":
        return "sd_v2_v" if base.prediction == "v" else "sd_v2"
    return {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0"}.get(base.family, f"{base.family}_sd")


def _short_hash(path: Path) -> str:
    """The short model hash by which web interfaces know a checkpoint: of 64 KiB from the second MiB on."""
    with open(path, "rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
