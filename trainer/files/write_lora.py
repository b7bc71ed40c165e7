"""Writes the LoRA file of a run, and checks it against the model in training before the file gets its name."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...tcd import TimePoint
from ...tcd.adapter import STUDENT
from ...tcd.files.atomic import atomic_write
from ..config.settings import Config
from ..errors import RunError
from ..models.conditioning import Conditioning
from ..models.seam import Model
from .adapter_weights import file_tensors, using_file

log = logging.getLogger("trajectory-consistency")
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""The relative error of a prediction that rounding to each dtype may cause."""
_PROBE_CELLS = 16  # height and width of the compared latent; a larger one would detect no more


class VerificationError(RunError):
    """The written file does not predict what the model in training predicts, or changes nothing; it was removed."""


def write_lora(
    path: Path, model: Model, config: Config, metadata: dict[str, str], cond: Conditioning, *, final: bool = False
) -> None:
    """Write the student's weights to a temporary file, read it back, compare one prediction, and rename it to `path`.

    cond: one row, any caption, for that prediction. final: whether the file is the run's result. An earlier file may
    still change nothing, for instance after a few small steps; this only causes a warning.

    Raises VerificationError if the file's prediction differs from the trained one by more than rounding or, if `final`,
    does not differ from the base's at all.
    """
    dtype = getattr(torch, config.output.dtype)
    tensors = file_tensors(model, model.adapter.weights[STUDENT])
    tensors = {key: value.to("cpu", dtype).contiguous() for key, value in tensors.items()}
    if unloaded := model.unloaded_keys(tensors):
        raise VerificationError(
            f"ComfyUI would not load {len(unloaded)} modules of the written LoRA, such as {unloaded[0]}: train "
            "other layers, by adapter.targets"
        )
    with atomic_write(path) as unfinished:
        save_file(tensors, unfinished, metadata=metadata)
        effect = _verified_effect(unfinished, model, cond, max(TOLERANCE[dtype], _rounding_error(model, cond, dtype)))
        if effect == 0 and final:
            raise VerificationError(
                "the written LoRA changes nothing: its prediction is the base model's; use a larger training.lr, or "
                "more training.steps"
            )
    if effect == 0:
        log.warning("%s changes nothing yet: its prediction is the base model's", path)


@torch.no_grad()
def _verified_effect(path: Path, model: Model, cond: Conditioning, tolerance: float) -> float:
    """Compare predictions with the file's weights, with the trained weights, and without an adapter.

    Returns the relative change that the file makes to the base's prediction. Raises VerificationError if the prediction
    with the file, by this trainer or by the program that loads it, differs from the trained one by more than
    `tolerance`, relative to the trained one, or is NaN.
    """
    trained = _predict(model, cond)
    with model.adapter.off():
        base = _predict(model, cond)
    with using_file(model, path):
        written = _predict(model, cond)
    _check_equal("the written LoRA", written, trained, tolerance)
    loaded = _predict_as_loaded(path, model, cond)
    if loaded is not None:
        _check_equal("ComfyUI, when it has loaded the written LoRA,", loaded, trained, tolerance)
    effect: float = ((written - base).norm() / base.norm()).item()
    return effect


def _check_equal(what: str, found: Tensor, trained: Tensor, tolerance: float) -> None:
    error = ((found - trained).norm() / trained.norm()).item()
    if not error <= tolerance:
        raise VerificationError(f"{what} predicts {error:.2e} away from the trained one (allowed: {tolerance:.0e})")


def _predict_as_loaded(path: Path, model: Model, cond: Conditioning) -> Tensor | None:
    x_t, t, s = _probe(model)
    try:
        return model.x0_as_loaded(path, x_t, t, cond, s)
    except ValueError as error:
        raise VerificationError(f"ComfyUI would not load the written LoRA: {error}") from error


@torch.no_grad()
def _rounding_error(model: Model, cond: Conditioning, file_dtype: torch.dtype) -> float:
    """Return the relative change of a prediction that rounding may cause, in the base's dtype and in the file's.

    In half precision, and in layers that round their inputs to 8 bits, even the smallest change of the adapter or of
    x_t makes all layers round differently, and this effect grows with the depth of the network. It is measured here by
    scaling x_t a little.
    """
    eps = max(torch.finfo(dtype).eps for dtype in (model.dtype, file_dtype))
    plain, nudged = _predict(model, cond), _predict(model, cond, scale=1 + eps / 8)
    return max(TOLERANCE.get(model.dtype, 0.0), 2 * ((nudged - plain).norm() / plain.norm()).item())


def _predict(model: Model, cond: Conditioning, scale: float = 1.0) -> Tensor:
    """Predict x0 from `scale` times the noise of `_probe`."""
    x_t, t, s = _probe(model)
    return model.x0(scale * x_t, t, cond, s)


def _probe(model: Model) -> tuple[Tensor, TimePoint, TimePoint]:
    """Return x_t, always the same noise, t in the middle of the clock, and s at a quarter of it."""
    side = _PROBE_CELLS * model.latents.stride
    noise = torch.randn((1, *model.latents.shape(side, side)), generator=torch.Generator().manual_seed(0))
    x_t = noise.to(model.device)
    times = model.schedule.num_times // 2, model.schedule.num_times // 4
    t, s = (model.schedule.point(torch.tensor([time], device=model.device), x_t.ndim) for time in times)
    return x_t, t, s
