"""Convert the host's model_sampling, for every kind of model, to a schedule of tcd/, and return sigmas for the host.

Sigmas are in the host's scale: variance exploding (x = x0 + sigma * eps), or rectified flow for a flow model.
"""

from typing import Any

import comfy.model_sampling
import torch
from torch import Tensor

from ...tcd import BridgeSchedule, ContinuousSchedule, DiscreteSchedule, FlowSchedule, Schedule


def schedule_of(model_sampling: Any) -> Schedule:
    """Return the schedule of a model; its class follows from the class of model_sampling."""
    bridge: Any = getattr(comfy.model_sampling, "IMG_TO_IMG_FLOW", ())  # older hosts lack the class
    if isinstance(model_sampling, bridge):  # must precede CONST, which is its base class
        return BridgeSchedule(model_sampling.sigmas)
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        # u is the time in [0, 1] before the shift. sigma() applies the shift, and expects time in the model's own unit:
        # timestep(1) is u = 1 in that unit, such as 1000.
        return FlowSchedule(lambda u: model_sampling.sigma(u * model_sampling.timestep(torch.ones(()))))
    # StableCascadeSampling is a ModelSamplingDiscrete by class, but its time is continuous.
    is_cascade = isinstance(model_sampling, comfy.model_sampling.StableCascadeSampling)
    if isinstance(model_sampling, comfy.model_sampling.ModelSamplingDiscrete) and not is_cascade:
        return DiscreteSchedule(model_sampling.sigmas, num_timesteps=model_sampling.num_timesteps)
    return ContinuousSchedule(float(model_sampling.sigma_max), timestep=_thousandths_of_flow_time)


def _thousandths_of_flow_time(sigma: Tensor) -> Tensor:
    # Not the time that the host gives such a network (for EDM a logarithm of sigma), because network times are used
    # here for the target time alone, whose embedding expects numbers of this size.
    return 1000 * sigma / (1 + sigma)


def tcd_sigmas(model: Any, *, steps: int, denoise: float, timesteps: str) -> Tensor:
    """Return SIGMAS [N + 1] ending in 0: at the typed timesteps, or if `timesteps` is blank, for N = steps.

    With denoise = 0 the result is empty, and the host does nothing. Raises ValueError if Schedule.sigmas_for or
    sigmas_at does.
    """
    schedule = schedule_of(model.get_model_object("model_sampling"))
    return schedule.sigmas_at(timesteps) if timesteps.strip() else schedule.sigmas_for(steps, denoise)


def scheduler_sigmas(model_sampling: Any, steps: int) -> Tensor:
    """Return SIGMAS [steps + 1] ending in 0. This is the function registered in the host's scheduler list.

    If denoise is below 1, the host asks for steps / denoise steps and uses the last ones. That can be more than the 50
    timesteps of the distillation grid, so a model with timesteps then gets a finer grid. Raises ValueError if the model
    has fewer than `steps` timesteps.
    """
    return schedule_of(model_sampling).sigmas_for(steps, refine=True)
