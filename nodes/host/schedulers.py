"""SIGMAS by the name of a scheduler, for the node that offers TCD's own and one of the host's."""

from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from .clock import scheduler_sigmas

SETUP_SCHEDULERS = ("simple", "sgm_uniform")
_MOST_STEPS = 10000  # as in KSampler


def setup_sigmas(model: Any, scheduler: str, *, steps: int, denoise: float) -> Tensor:
    """Return SIGMAS [N + 1], 0 last: for simple those of scheduler_sigmas, else those of the host's scheduler.

    The last `steps` of floor(steps / denoise) are taken, as by BasicScheduler and KSampler; none for denoise = 0.
    Raises ValueError as scheduler_sigmas does, for another scheduler, and for more than 10000 to take them from.
    """
    if scheduler not in SETUP_SCHEDULERS:
        raise ValueError(f"scheduler is {scheduler!r}, but must be one of {', '.join(SETUP_SCHEDULERS)}")
    if denoise == 0:
        return torch.zeros(0)
    if steps / denoise > _MOST_STEPS:
        raise ValueError(
            f"steps / denoise is {steps} / {denoise!r}, but must be at most {_MOST_STEPS}: use fewer steps or a higher "
            "denoise"
        )
    sampling, total = model.get_model_object("model_sampling"), int(steps / denoise)
    if scheduler == "simple":
        sigmas = scheduler_sigmas(sampling, total)
    else:
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, total).cpu()
    return sigmas[-(steps + 1) :]
