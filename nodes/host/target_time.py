"""Pass the target time to the network, for a LoRA with a target-time embedding (TCF(S+) of arXiv 2402.19159).

The TCD sampler hands over (t, s) with each call of the model. A term on the last Linear of the MLP that embeds t adds
the embedding of (t, s), which is one vector for all rows of the call.

t and s are network times of the schedule, as in training: timesteps, or thousandths of flow time.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from ...tcd import BridgeSchedule, Schedule, TargetTime
from .layer_terms import NETWORK, ModelCall, add_term
from .model_schedule import schedule_of
from .time_layer import find_time_linear, is_linear

_TIMES_OPTION = "tcd_target_time"  # key in transformer_options: the network times (t, s), 0-dim each
_SAME_LEVEL = 1e-4  # relative difference up to which two sigmas are one level, rounded differently
_log = logging.getLogger("trajectory-consistency")


def with_target_time(
    model_options: dict[str, Any], schedule: Schedule, sigma: Tensor, sigma_s: Tensor
) -> dict[str, Any]:
    """Return model_options with the network times (t, s) of sigma and sigma_s, 0-dim each, handed over to the model."""
    if isinstance(schedule, BridgeSchedule):  # it has no network times, and no LoRA with an embedding is applied
        return model_options
    options = model_options.get("transformer_options", {})
    handed = {**options, _TIMES_OPTION: _network_times(schedule, sigma, sigma_s)}
    return {**model_options, "transformer_options": handed}


def check_target_time(model: Any, name: str, shape: tuple[int, int], path: str | None) -> str:
    """Return the path of the layer to whose output the embedding of a file is added.

    name: the file's. shape: (channels, width) of its embedding. path: the layer's path if the file names it. Raises
    ValueError if the model has no such layer, the layer has another width, or the model knows no noise.
    """
    refused = f"{name} does not fit the model, and nothing was applied: its embedding of the target time"
    network = getattr(model.model, NETWORK)
    found = path if path is not None else find_time_linear(network)
    if found is None:
        raise ValueError(
            f"{refused} has no place in the model, whose network has no known layer that embeds t: use a file that "
            "names the layer, in its metadata tcd.target_time.module"
        )
    layer: Any = dict(network.named_modules()).get(found)
    if not is_linear(layer):
        raise ValueError(f"{refused} is for the layer {found!r}, which is not a Linear of this model")
    if layer.out_features != shape[1]:
        raise ValueError(
            f"{refused} has the width {shape[1]}, but the model's own, of t, has {layer.out_features} ({found})"
        )
    if isinstance(schedule_of(model.get_model_object("model_sampling")), BridgeSchedule):
        raise ValueError(f"{refused} needs network times, and a model that knows no noise has none")
    return found


def install_target_time(model: Any, name: str, path: str, embedding: TargetTime, strength: float) -> None:
    """Install an embedding on a clone of a model, in place; path: from check_target_time."""
    add_term(model, path, _TargetTimeTerm(name, embedding.requires_grad_(False), strength))


class _TargetTimeTerm:
    """Adds strength * embedding(t, s). It is computed on the CPU, because devices share it; that takes milliseconds."""

    def __init__(self, name: str, embedding: TargetTime, strength: float) -> None:
        """name: the LoRA file's."""
        self.name, self.embedding, self.strength = name, embedding, strength
        self._warned = False

    def __call__(self, call: ModelCall, layer: Any, x: Tensor) -> Tensor:
        """Return the term [width]."""
        t, s = call.options.get(_TIMES_OPTION) or self._times_of_other_sampler(call)
        (embedded,) = self.embedding(t.unsqueeze(0), s.unsqueeze(0))
        return (self.strength * embedded).to(x.device)

    def _times_of_other_sampler(self, call: ModelCall) -> tuple[Tensor, Tensor]:
        """Return t and s for a sampler that passes none: s is the time of the next lower sigma, or 0 if it is unknown.

        A sampler may compute a sigma that differs from the listed one in the last bits, which are few in float16.
        """
        if not self._warned:
            self._warned = True
            _log.warning(
                "%s needs the target time of each step, which only the TCD sampler passes: with another sampler it "
                "gets the time of the next sigma. Use TCD Sampler, or tcd in KSampler",
                self.name,
            )
        tolerance = max(_SAME_LEVEL, torch.finfo(call.sigma.dtype).eps)
        sigma = call.sigma[0].cpu().float()
        steps = call.options.get("sample_sigmas", sigma.new_zeros(1)).cpu()
        below = steps[steps < sigma * (1 - tolerance)]
        sigma_next = below.max() if len(below) else torch.zeros(())
        return _network_times(schedule_of(call.model.model_sampling), sigma, sigma_next)


def _network_times(schedule: Schedule, sigma: Tensor, sigma_s: Tensor) -> tuple[Tensor, Tensor]:
    """Return the network times of two sigmas, 0-dim each."""
    t, s = schedule.point_at(torch.stack([sigma, sigma_s])).network_time
    return t, s
