"""SIGMAS by the name of a scheduler, for the node that offers TCD's own and one of the host's."""

from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from .clock import tcd_sigmas

SETUP_SCHEDULERS = ("simple", "sgm_uniform")


def setup_sigmas(model: Any, scheduler: str, *, steps: int, denoise: float) -> Tensor:
    """Return SIGMAS [N + 1], 0 last: for simple those of tcd_sigmas, for sgm_uniform those of the host's scheduler.

    Of the host's, the last `steps` of floor(steps / denoise) are taken, as by BasicScheduler; none for denoise = 0.
    Raises ValueError as tcd_sigmas does, and for another scheduler.
    """
    if scheduler not in SETUP_SCHEDULERS:
        raise ValueError(f"scheduler is {scheduler!r}, but must be one of {', '.join(SETUP_SCHEDULERS)}")
    if scheduler == "simple":
        return tcd_sigmas(model, steps=steps, denoise=denoise, timesteps="")
    if denoise == 0:
        return torch.zeros(0)
    sampling = model.get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(sampling, scheduler, int(steps / denoise)).cpu()[-(steps + 1) :]
