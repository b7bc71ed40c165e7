"""TCD in the host's own lists of samplers and schedulers, from which KSampler and its like let people choose."""

import logging
from typing import Any

import comfy.samplers
from comfy.k_diffusion import sampling as k_diffusion
from torch import Tensor

from .clock import scheduler_sigmas
from .sampling import sample_with_tcd

NAME = "tcd"

_ETA = "tcd_eta"
_DEFAULT_ETA = 0.3
_log = logging.getLogger("trajectory-consistency")


def set_eta(model: Any, eta: float) -> Any:
    """Return a clone of the model on which the sampler "tcd" of the host's list has this eta, gamma in [0, 1]."""
    if getattr(k_diffusion, f"sample_{NAME}", None) is not sample_tcd:
        _log.warning(
            "%r in KSampler's list is another pack's, and heeds no eta: use SamplerCustom with TCD Sampler", NAME
        )
    model = model.clone()
    model.model_options[_ETA] = eta
    return model


def sample_tcd(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
) -> Tensor:
    """Sample as sample_with_tcd, called by its name in the host's list and so without gamma: it is the model's eta."""
    options = (extra_args or {}).get("model_options", {})
    return sample_with_tcd(model, x, sigmas, extra_args, callback, disable, gamma=options.get(_ETA, _DEFAULT_ETA))


def register() -> None:
    """Put "tcd" into the host's lists of samplers and of schedulers, in place; once, however often it is called.

    Another pack's "tcd" that is there first is left as it is, and the log says so.
    """
    taken = []
    if _claim(vars(k_diffusion), f"sample_{NAME}", sample_tcd):
        _append(comfy.samplers.SAMPLER_NAMES, comfy.samplers.KSampler.SAMPLERS)
    else:
        taken.append("sampler")
    handler = comfy.samplers.SchedulerHandler(scheduler_sigmas)
    if _claim(comfy.samplers.SCHEDULER_HANDLERS, NAME, handler):
        _append(comfy.samplers.SCHEDULER_NAMES, comfy.samplers.KSampler.SCHEDULERS)
    else:
        taken.append("scheduler")
    if taken:
        _log.warning(
            "%s %r in KSampler's list is another pack's, and stays so: for this pack's, use SamplerCustom with "
            "TCD Sampler and TCD Sigmas",
            " and ".join(taken).capitalize(),
            NAME,
        )


def _claim(registry: dict[str, Any], key: str, ours: Any) -> bool:
    return registry.setdefault(key, ours) == ours


def _append(*lists: list[str]) -> None:
    # The node's list and KSampler's are one and the same, until some pack binds one of them anew.
    for names in lists:
        if NAME not in names:
            names.append(NAME)
