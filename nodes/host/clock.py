"""Converts the host's model_sampling, for every kind of model, to a schedule of tcd/.

Sigmas are in the host's scale: variance exploding (x = x0 + sigma * eps), or rectified flow for a flow model.
"""

from typing import Any

import comfy.model_sampling
import torch
from torch import Tensor

from ...tcd import BridgeSchedule, ContinuousSchedule, DiscreteSchedule, FlowSchedule, Schedule


def schedule_of(model_sampling: Any) -> Schedule:
    """Return the schedule of a model, chosen by the class of its model_sampling."""
    bridge: Any = getattr(comfy.model_sampling, "IMG_TO_IMG_FLOW", ())  # older hosts lack the class
    if isinstance(model_sampling, bridge):  # before CONST, of which it is a subclass
        return BridgeSchedule(model_sampling.sigmas)
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        # u is time in [0, 1] before the shift: timestep(1) is the model's unit of time, and sigma() applies the shift.
        return FlowSchedule(lambda u: model_sampling.sigma(u * model_sampling.timestep(torch.ones(()))))
    # StableCascadeSampling is a ModelSamplingDiscrete by class, but its time is continuous.
    is_cascade = isinstance(model_sampling, comfy.model_sampling.StableCascadeSampling)
    if isinstance(model_sampling, comfy.model_sampling.ModelSamplingDiscrete) and not is_cascade:
        return DiscreteSchedule(model_sampling.sigmas, num_timesteps=model_sampling.num_timesteps)
    return ContinuousSchedule(float(model_sampling.sigma_max))


def tcd_sigmas(model: Any, *, steps: int, denoise: float, timesteps: str) -> Tensor:
    """Return SIGMAS [N + 1] ending in 0, at the typed timesteps if there are any, else N steps evenly spaced in time.

    Empty if denoise = 0; the host then does nothing. Raises ValueError if Schedule.sigmas_for or sigmas_at does.
    """
    schedule = schedule_of(model.get_model_object("model_sampling"))
    return schedule.sigmas_at(timesteps) if timesteps.strip() else schedule.sigmas_for(steps, denoise)


def scheduler_sigmas(model_sampling: Any, steps: int) -> Tensor:
    """Return SIGMAS [steps + 1] ending in 0. This is the function registered in the host's scheduler list.

    If denoise is below 1, the host asks for steps / denoise steps and keeps the last ones. A discrete model therefore
    also uses timesteps between those of the distillation grid. Raises ValueError if it has fewer than `steps`.
    """
    return schedule_of(model_sampling).sigmas_for(steps, refine=True)
