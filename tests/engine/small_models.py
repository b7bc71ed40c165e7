"""The small stand-ins of ComfyUI's model families, loaded by ComfyUI, and what a training step on them needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from families import FAMILIES, written
from torch import Tensor, nn

from trajectory_consistency.nodes import host
from trajectory_consistency.nodes.host.target_time import with_target_time
from trajectory_consistency.nodes.host.training import HostNetwork
from trajectory_consistency.tcd import AdapterWeights, TargetInput
from trajectory_consistency.tcd.adapter import STUDENT, layer_shapes
from trajectory_consistency.tcd.times import Points
from trajectory_consistency.tcd.trajectory import add_noise

each_family = pytest.mark.parametrize("name", list(FAMILIES))


def load(name: str, folder: Path, **options: Any) -> Any:
    """Return the host's MODEL of a family's stand-in."""
    return FAMILIES[name].load(written(name, folder), **options)


def open_network(name: str, folder: Path) -> HostNetwork:
    """Return the network of a family's stand-in, without an adapter."""
    return HostNetwork(load(name, folder), FAMILIES[name].time_linear)


def add_student(
    network: HostNetwork, *, fresh: bool = False, target_input: TargetInput | None = None
) -> AdapterWeights:
    """Add a LoRA beside every layer; unless it is fresh, its weights are random, so that it changes the output."""
    weights = network.new_weights(
        list(layer_shapes(network.network)), rank=2, alpha=2.0, seed=0, target_input=target_input
    )
    if not fresh:
        generator = torch.Generator().manual_seed(1)
        for parameter in weights.parameters():
            nn.init.normal_(parameter, std=0.05, generator=generator)
    return network.adapter.add(STUDENT, weights)


@dataclass(frozen=True)
class Batch:
    """Two examples for a network: x_t is at points.t."""

    x0: Tensor
    eps: Tensor
    points: Points
    conds: list[Any]
    unconds: list[Any]

    @property
    def x_t(self) -> Tensor:
        return add_noise(self.x0, self.eps, self.points.t.level)

    def predict(self, network: HostNetwork) -> Tensor:
        """Call x0, with the target time where the adapter needs it."""
        s = None if network.adapter.target_time is None else self.points.s
        return network.x0(self.x_t, self.points.t, self.conds, s)


def batch_for(name: str, network: HostNetwork) -> Batch:
    """Return random latents and CONDITIONING; the second example is on the diagonal, s = t_next."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(7)
    x0, eps = (torch.randn(2, *family.latent, generator=generator) for _ in range(2))
    times = ([800, 500], [600, 400], [300, 400])
    points = Points(*(network.schedule.point(torch.tensor(time), x0.ndim) for time in times))
    return Batch(x0, eps, points, [family.conditioning(1), family.conditioning(2)], [family.conditioning(3)])


def shortened(conditioning: Any, tokens: int = 7) -> Any:
    """Return CONDITIONING of the first few tokens only, as of a shorter caption."""
    ((context, options),) = conditioning
    masks = {name: value[:, :tokens] for name, value in options.items() if name == "attention_mask"}
    return [[context[:, :tokens], options | masks]]


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the relative difference of two tensors."""
    return float((found - expected).norm() / expected.norm())


def sampled_x0(
    patcher: Any,
    x: Tensor,
    sigma: Tensor,
    positive: Any,
    negative: Any = None,
    cfg: float = 1.0,
    sigma_s: Tensor | None = None,
) -> Tensor:
    """Return the x0 that the host's own sampler gets at x [B, C, ...], in the sampling scale, and sigma (0-dim).

    sigma_s: the level of the target time, which is handed over as by the TCD sampler.
    """
    found = []

    def call_once(model: Any, noisy: Tensor, sigmas: Tensor, extra_args: dict[str, Any], **_: Any) -> Tensor:
        if sigma_s is not None:
            schedule = host.schedule_of(patcher.get_model_object("model_sampling"))
            extra_args["model_options"] = with_target_time(extra_args["model_options"], schedule, sigma, sigma_s)
        found.append(model(x, sigma * x.new_ones(len(x)), **extra_args))
        return noisy

    sampler, sigmas = comfy.samplers.KSAMPLER(call_once), torch.stack([sigma, torch.zeros(())])
    latent = torch.zeros_like(x)
    comfy.sample.sample_custom(patcher, latent, cfg, sampler, sigmas, positive, negative or positive, latent, seed=0)
    return found[0]
