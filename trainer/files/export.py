"""Write the LoRA file, and compare what was written with the model in training before the file gets its name."""

from __future__ import annotations

import datetime
import hashlib
import logging
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...tcd.adapter import STUDENT
from ..atomic import atomic_write
from ..config.settings import Config
from ..errors import RunError
from ..models.conditioning import Conditioning
from ..models.seam import Checkpoint, Model
from .adapter_file import TOLD
from .adapter_weights import file_in_use, file_tensors

_METHODS = {"uniform": "tcd", "zero": "lcm", "segment": "tscd", "phase": "pcm", "target": "tdd"}
log = logging.getLogger("trajectory-consistency")
CONFIG_DIGEST = "tcd.config_sha256"
"""The metadata key for the configuration that a LoRA was made from."""
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-2}
_PROBE_CELLS = 16  # height and width of the latent that both are compared on: more would prove no more


class ExportError(RunError):
    """The written file does not predict what the model in training predicts; it was removed."""


def write_lora(
    path: Path, model: Model, config: Config, metadata: dict[str, str], cond: Conditioning, *, final: bool = False
) -> None:
    """Write the student's weights to `path`, atomically, after reading them back and comparing one prediction.

    cond: one row, any caption, for that prediction.  final: the file is the run's result; earlier ones may change
    nothing yet, as after a few small steps, and only a warning is logged then.  Raises ExportError if the file's
    prediction differs from the trained one by more than rounding or, if `final`, not at all from the base's.
    """
    dtype = getattr(torch, config.output.dtype)
    tensors = file_tensors(model, model.adapter.weights[STUDENT])
    tensors = {key: value.to("cpu", dtype).contiguous() for key, value in tensors.items()}
    with atomic_write(path) as unfinished:
        save_file(tensors, unfinished, metadata=metadata)
        effect = _verify(unfinished, model, cond, max(TOLERANCE[dtype], _rounding(model, cond)))
        if effect == 0 and final:
            raise ExportError(
                "the written LoRA changes nothing: its prediction is the base model's; use a larger training.lr, or "
                "more training.steps"
            )
    if effect == 0:
        log.warning("%s changes nothing yet: its prediction is the base model's", path)


@torch.no_grad()
def _verify(path: Path, model: Model, cond: Conditioning, tolerance: float) -> float:
    """Read the file back onto the same frozen base, and compare.

    Return by how much it changes the base's prediction, relative to that.
    """
    trained = _probe(model, cond)
    with model.adapter.off():
        base = _probe(model, cond)
    with file_in_use(model, path):
        written = _probe(model, cond)
    error = ((written - trained).norm() / trained.norm()).item()
    effect: float = ((written - base).norm() / base.norm()).item()
    if not error <= tolerance:
        raise ExportError(f"the written LoRA predicts {error:.2e} away from the trained one (allowed: {tolerance:.0e})")
    return effect


@torch.no_grad()
def _rounding(model: Model, cond: Conditioning) -> float:
    """How much rounding alone may change a prediction, relative to it: nothing in a base of float32.

    In half precision the smallest change of the adapter, or of x_t, changes the result by as much as the rounding of
    all layers together, which is more the deeper the network is.
    """
    if model.dtype not in TOLERANCE:
        return 0.0
    plain, nudged = _probe(model, cond), _probe(model, cond, scale=1 + torch.finfo(model.dtype).eps / 8)
    return max(TOLERANCE[model.dtype], 2 * ((nudged - plain).norm() / plain.norm()).item())


def _probe(model: Model, cond: Conditioning, scale: float = 1.0) -> Tensor:
    """One prediction, always at the same times and noise, which is multiplied by `scale`."""
    side = _PROBE_CELLS * model.latents.stride
    noise = torch.randn((1, *model.latents.shape(side, side)), generator=torch.Generator().manual_seed(0))
    x_t = scale * noise.to(model.device)
    t, s = (model.schedule.point(torch.tensor([time], device=model.device), x_t.ndim) for time in (499, 259))
    return model.x0(x_t, t, cond, s)


def describe(config: Config, checkpoint: Checkpoint) -> dict[str, str]:
    """The file's metadata: what other tools read (modelspec, ss_*), and what TCD's own settings were (tcd.*)."""
    method, output = config.method, config.output
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": output.name,
        "modelspec.date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **checkpoint.lora_metadata(),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.adapter.rank),
        "ss_network_alpha": str(config.adapter.alpha),
        "tcd.version": version("trajectory-consistency"),
        "tcd.method": _METHODS[method.law],
        "tcd.law": method.law,
        "tcd.grid": str(method.origin_steps),
        "tcd.skip": str(method.skip),
        "tcd.guidance_min": str(method.guidance_min),
        "tcd.guidance_max": str(method.guidance_max),
        "tcd.prediction_type": checkpoint.prediction,
        TOLD: method.target_input if method.target_time else "none",
        "tcd.steps": str(output.steps),
        "tcd.eta": str(output.eta),
        "tcd.cfg": str(output.cfg),
        CONFIG_DIGEST: config_digest(config),
    }


def config_digest(config: Config) -> str:
    """The SHA-256 of a configuration as `config.toml` has it."""
    return hashlib.sha256(config.to_toml().encode()).hexdigest()
