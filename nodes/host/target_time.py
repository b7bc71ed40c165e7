"""Pass the target time to the network, for a LoRA with a target-time embedding (TCF(S+) of arXiv 2402.19159).

The TCD sampler passes (t, s) with each call of the model. A patch on the model embeds them and adds the result to the
network's embedding of t.
"""

import logging
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from ...tcd import DiscreteSchedule, Schedule, TargetTime
from .model_schedule import schedule_of

_TIMES_OPTION = "tcd_target_time"  # key in transformer_options: the timesteps (t, s), [B] each
_log = logging.getLogger("trajectory-consistency")


class TargetTimePatch:
    """Adds a target-time embedding to the network's embedding of t; the host calls it as an emb_patch."""

    def __init__(self, name: str, embedding: TargetTime, strength: float, schedule: DiscreteSchedule) -> None:
        """Add strength * embedding. name: the LoRA file's. schedule: converts sigmas if another sampler is used."""
        self.name, self.embedding, self.strength, self.schedule = name, embedding, strength, schedule
        self._warned = False

    @torch.no_grad()
    def __call__(self, emb: Tensor, model_channels: int, transformer_options: dict[str, Any]) -> Tensor:
        """Return emb [k B, width] with the embedding added; its rows are k conditions of B images each."""
        times = transformer_options.get(_TIMES_OPTION)
        if times is None:
            times = self._times_of_other_sampler(transformer_options)
        t, s = (repeat(time.to(emb.device), "b -> (k b)", k=len(emb) // len(time)) for time in times)
        return emb + (self.strength * self.embedding(t, s)).to(emb)

    def to(self, target: Any) -> "TargetTimePatch":
        """Move the embedding to a device. A dtype is ignored: the embedding is always computed in float32."""
        if not isinstance(target, torch.dtype):
            # Rebuilt, because torch cannot move parameters that were created in inference mode.
            moved = {name: tensor.to(target) for name, tensor in self.embedding.state_dict().items()}
            with torch.device(target):
                self.embedding = TargetTime.from_state_dict(moved, self.embedding.target_input)
        return self

    def _times_of_other_sampler(self, transformer_options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return t and s for a sampler that passes none: s is the timestep of the next sigma, or 0 if it is unknown."""
        if not self._warned:
            self._warned = True
            _log.warning(
                "%s needs the target time of each step, which only the TCD sampler passes: with another sampler it "
                "gets the time of the next sigma. Use TCD Sampler, or tcd in KSampler",
                self.name,
            )
        sigma = transformer_options["sigmas"].cpu()
        steps = transformer_options.get("sample_sigmas")
        below = steps.cpu()[steps.cpu() < sigma[0]] if steps is not None else sigma[:0]
        sigma_next = below.max() if len(below) else sigma.new_zeros(())
        return self.schedule.timestep(sigma), self.schedule.timestep(sigma_next).expand(len(sigma))


def with_target_time(
    model_options: dict[str, Any], schedule: Schedule, sigma: Tensor, sigma_s: Tensor, batch: int
) -> dict[str, Any]:
    """Return model_options with the timesteps (t, s) added; unchanged if the model has no TargetTimePatch.

    sigma, sigma_s: 0-dim, the sigmas at t and s.
    """
    options = model_options.get("transformer_options", {})
    patches = options.get("patches", {}).get("emb_patch", ())
    if not isinstance(schedule, DiscreteSchedule) or not any(isinstance(patch, TargetTimePatch) for patch in patches):
        return model_options
    times = tuple(schedule.timestep(level).expand(batch) for level in (sigma, sigma_s))
    return {**model_options, "transformer_options": {**options, _TIMES_OPTION: times}}


def install_target_time(model: Any, name: str, embedding: TargetTime, strength: float) -> None:
    """Install an embedding on a model, in place. Raises ValueError if the model has no timesteps."""
    schedule = schedule_of(model.get_model_object("model_sampling"))
    if not isinstance(schedule, DiscreteSchedule):
        raise ValueError(f"{name} was not applied: it needs timesteps, and this model's sampling has none")
    model.set_model_emb_patch(TargetTimePatch(name, embedding, strength, schedule))
