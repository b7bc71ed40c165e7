"""SIGMAS by scheduler name, for the node TCD Sampling Setup: "simple" is TCD's scheduler, "sgm_uniform" the host's."""

from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from .model_schedule import scheduler_sigmas

SETUP_SCHEDULERS = ("simple", "sgm_uniform")
_MAX_STEPS = 10000  # as in KSampler


def setup_sigmas(model: Any, scheduler: str, *, steps: int, denoise: float) -> Tensor:
    """Return SIGMAS [steps + 1] ending in 0: from scheduler_sigmas for "simple", else from the host's scheduler.

    As in BasicScheduler and KSampler, the scheduler gets floor(steps / denoise) steps, and the last `steps` of them are
    used. With denoise = 0 the result is empty. Raises ValueError for an unknown scheduler, if steps / denoise exceeds
    10000, or if scheduler_sigmas raises it.
    """
    if scheduler not in SETUP_SCHEDULERS:
        raise ValueError(f"scheduler is {scheduler!r}, but must be one of {', '.join(SETUP_SCHEDULERS)}")
    if denoise == 0:
        return torch.zeros(0)
    if steps / denoise > _MAX_STEPS:
        raise ValueError(
            f"steps / denoise is {steps} / {denoise!r}, but must be at most {_MAX_STEPS}: use fewer steps or a higher "
            "denoise"
        )
    sampling, total = model.get_model_object("model_sampling"), int(steps / denoise)
    if scheduler == "simple":
        sigmas = scheduler_sigmas(sampling, total)
    else:
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, total).cpu()
    return sigmas[-(steps + 1) :]
