"""The target time told to the network, for a LoRA that comes with an embedding of it (TCF(S+) of arXiv 2402.19159).

The sampler hands (t, s) over with each call of the model, and the patch on the model adds the embedding of them.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from ...tcd import DiscreteSchedule, Schedule, TargetTime
from .clock import schedule_of

_HANDED = "tcd_target_time"  # in transformer_options: timesteps t and s, [B] each
_log = logging.getLogger("trajectory-consistency")


class TargetTimePatch:
    """A patch of the network's embedding of t, as the host's ModelPatcher takes it."""

    def __init__(self, name: str, embedding: TargetTime, strength: float, schedule: DiscreteSchedule) -> None:
        """Add `embedding`, of the file `name`, times `strength`; the schedule tells the time to another sampler's."""
        self.name, self.embedding, self.strength, self.schedule = name, embedding, strength, schedule
        self._warned = False

    @torch.no_grad()
    def __call__(self, emb: Tensor, model_channels: int, transformer_options: dict[str, Any]) -> Tensor:
        """Return emb [k B, width], of k conditions of B images one after another, with the embedding added."""
        times = transformer_options.get(_HANDED)
        if times is None:
            times = self._of_another_sampler(transformer_options)
        t, s = (time.to(emb.device).repeat(len(emb) // len(time)) for time in times)
        return emb + (self.strength * self.embedding(t, s)).to(emb)

    def to(self, target: Any) -> "TargetTimePatch":
        """Move to a device, with the model; the numbers stay float32, whatever its are."""
        if not isinstance(target, torch.dtype):
            # A new one: torch does not move parameters in place that were made in inference mode, as all are here.
            moved = {name: tensor.to(target) for name, tensor in self.embedding.state_dict().items()}
            with torch.device(target):
                self.embedding = TargetTime.of(moved, self.embedding.told)
        return self

    def _of_another_sampler(self, transformer_options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Tell t and s where nobody hands them over: s is the time of the next sigma, or 0 if that is not known."""
        if not self._warned:
            self._warned = True
            _log.warning(
                "%s is made to be told where each step of the TCD sampler goes: with another sampler it is told the "
                "time of the next sigma. Use TCD Sampler, or tcd in KSampler",
                self.name,
            )
        sigma = transformer_options["sigmas"].cpu()
        steps = transformer_options.get("sample_sigmas")
        below = steps.cpu()[steps.cpu() < sigma[0]] if steps is not None else sigma[:0]
        sigma_next = below.max() if len(below) else sigma.new_zeros(())
        return self.schedule.timestep(sigma), self.schedule.timestep(sigma_next).expand(len(sigma))


def told(model_options: dict[str, Any], schedule: Schedule, sigma: Tensor, sigma_s: Tensor, batch: int) -> Any:
    """Return the model_options of one call, in which t and s are handed over to the patches, if there are any.

    sigma, sigma_s: 0-dim, of the call and of its target.
    """
    options = model_options.get("transformer_options", {})
    patches = options.get("patches", {}).get("emb_patch", ())
    if not isinstance(schedule, DiscreteSchedule) or not any(isinstance(each, TargetTimePatch) for each in patches):
        return model_options
    times = tuple(schedule.timestep(each).expand(batch) for each in (sigma, sigma_s))
    return {**model_options, "transformer_options": {**options, _HANDED: times}}


def put_target_time(model: Any, name: str, embedding: TargetTime, strength: float) -> None:
    """Have a cloned model told the target time; raises ValueError when the embedding is not one for it."""
    schedule = schedule_of(model.get_model_object("model_sampling"))
    if not isinstance(schedule, DiscreteSchedule):
        raise ValueError(f"{name} was not applied: it is told timesteps, of which this model's sampling has none")
    model.set_model_emb_patch(TargetTimePatch(name, embedding, strength, schedule))
