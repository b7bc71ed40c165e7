"""Register "tcd" in the host's sampler and scheduler lists, from which KSampler and similar nodes choose by name."""

import logging
from typing import Any

import comfy.samplers
from comfy.k_diffusion import sampling as k_diffusion
from torch import Tensor

from ...tcd.lora_metadata import DEFAULT_ETA
from .model_schedule import scheduler_sigmas
from .sampling import sample_with_tcd

NAME = "tcd"

_ETA_OPTION = "tcd_eta"  # key in a model's model_options
_log = logging.getLogger("trajectory-consistency")


def set_eta(model: Any, eta: float) -> Any:
    """Return a clone of the model with an eta, the paper's gamma in [0, 1], for the sampler "tcd" of KSampler."""
    if getattr(k_diffusion, f"sample_{NAME}", None) is not sample_tcd:
        _log.warning(
            "%r in KSampler's list belongs to another pack and ignores eta: use SamplerCustom with TCD Sampler", NAME
        )
    model = model.clone()
    model.model_options[_ETA_OPTION] = eta
    return model


def sample_tcd(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
) -> Tensor:
    """Call sample_with_tcd with gamma from the model's options, because the host passes no gamma to listed samplers."""
    options = (extra_args or {}).get("model_options", {})
    return sample_with_tcd(model, x, sigmas, extra_args, callback, disable, gamma=options.get(_ETA_OPTION, DEFAULT_ETA))


def register() -> None:
    """Add "tcd" to the host's sampler and scheduler lists, in place. Further calls add nothing.

    If another pack has already registered a "tcd", that one is kept and a warning is logged.
    """
    kept = []
    if _register_if_free(vars(k_diffusion), f"sample_{NAME}", sample_tcd):
        _append_name(comfy.samplers.SAMPLER_NAMES, comfy.samplers.KSampler.SAMPLERS)
    else:
        kept.append("sampler")
    handler = comfy.samplers.SchedulerHandler(scheduler_sigmas)
    if _register_if_free(comfy.samplers.SCHEDULER_HANDLERS, NAME, handler):
        _append_name(comfy.samplers.SCHEDULER_NAMES, comfy.samplers.KSampler.SCHEDULERS)
    else:
        kept.append("scheduler")
    if kept:
        _log.warning(
            "%s %r in KSampler's list belongs to another pack and was kept: to use this pack's, use SamplerCustom with "
            "TCD Sampler and TCD Sigmas",
            " and ".join(kept).capitalize(),
            NAME,
        )


def _register_if_free(registry: dict[str, Any], key: str, ours: Any) -> bool:
    """Set registry[key] to `ours` unless the key is in use; return whether registry[key] is ours."""
    return registry.setdefault(key, ours) == ours


def _append_name(*lists: list[str]) -> None:
    # Usually both lists are the same object, but another pack may have replaced one of them.
    for names in lists:
        if NAME not in names:
            names.append(NAME)
