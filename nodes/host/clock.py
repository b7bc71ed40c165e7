"""The host's model_sampling, whatever the kind of model, as the schedule that tcd/ samples on.

The clock here is sigma on the host's scale: variance exploding (x = x0 + sigma * eps), or flow where the model is one.
"""

from typing import Any

import comfy.model_sampling as kinds
import torch
from torch import Tensor

from ...tcd import BridgeSchedule, ContinuousSchedule, DiscreteSchedule, FlowSchedule, Schedule


def schedule_of(model_sampling: Any) -> Schedule:
    """Return the clock of a model, told apart by the classes by which the host itself tells its models apart."""
    bridge: Any = getattr(kinds, "IMG_TO_IMG_FLOW", ())  # newer hosts have it
    if isinstance(model_sampling, bridge):  # and it is a CONST by class
        return BridgeSchedule(model_sampling.sigmas)
    if isinstance(model_sampling, kinds.CONST):
        # timestep() and sigma() invert each other but for the shift: each model counts time in units of its own.
        return FlowSchedule(lambda u: model_sampling.sigma(u * model_sampling.timestep(torch.ones(()))))
    is_discrete = isinstance(model_sampling, kinds.ModelSamplingDiscrete)
    if is_discrete and not isinstance(model_sampling, kinds.StableCascadeSampling):  # whose time is continuous
        return DiscreteSchedule(model_sampling.sigmas, num_timesteps=model_sampling.num_timesteps)
    return ContinuousSchedule(float(model_sampling.sigma_max))


def tcd_sigmas(model: Any, *, steps: int, denoise: float, timesteps: str) -> Tensor:
    """Return SIGMAS [N + 1] of a model, 0 last: at the timesteps typed, else at N steps evenly spaced on its clock.

    Empty for denoise = 0, which the host takes as nothing to do. Raises ValueError as Schedule's sigmas_for and
    sigmas_at do.
    """
    schedule = schedule_of(model.get_model_object("model_sampling"))
    return schedule.sigmas_at(timesteps) if timesteps.strip() else schedule.sigmas_for(steps, denoise)


def scheduler_sigmas(model_sampling: Any, steps: int) -> Tensor:
    """Return SIGMAS [steps + 1], 0 last, as the host's own schedulers do: what its lists call.

    Where denoise is below 1 the host asks for steps / denoise of them and keeps the last, so a discrete model gives
    more than the distillation grid has, up to all its timesteps. Raises ValueError beyond.
    """
    return schedule_of(model_sampling).sigmas_for(steps, refine=True)
