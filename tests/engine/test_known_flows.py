"""A flow whose trajectories have a closed form, a Gaussian or a point mass, is learned on the host's own clock.

The network is a model of the host's with CONST sampling. Its teacher, which has no target time, follows the exact
trajectory for one solver step.
"""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models_base
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from trajectory_consistency.tcd import Level
from trajectory_consistency.tcd.adapter import STUDENT
from trajectory_consistency.tcd.distill import step_losses
from trajectory_consistency.tcd.distill.order import Group
from trajectory_consistency.tcd.distill.sampling import initial_noise, sample_latents
from trajectory_consistency.tcd.target_time import sinusoid
from trajectory_consistency.trainer.config.settings import Config, from_mapping
from trajectory_consistency.trainer.data.buckets import Size
from trajectory_consistency.trainer.data.dataset import Dataset, Table, caption_of
from trajectory_consistency.trainer.files.adapter_weights import initial_weights
from trajectory_consistency.trainer.models.comfy.conditioning import join
from trajectory_consistency.trainer.models.comfy.model import HostModel
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.framing import Framing
from trajectory_consistency.trainer.models.seam import LatentFormat
from trajectory_consistency.trainer.training.examples import read_examples
from trajectory_consistency.trainer.training.loop import train

MEAN, GUIDANCE, SKIP, CHANNELS, WIDTH, PICTURES = 0.3, 3.0, 200, 16, 128, 64
"""MEAN is the caption's. The guided teacher has GUIDANCE times that mean."""
STDS = {"Gaussian": 0.5, "point mass": 0.0}

each_shift = pytest.mark.parametrize("shift", [1.0, 3.0])
each_std = pytest.mark.parametrize("std", STDS.values(), ids=STDS.keys())


def exact_map(x: Tensor, t: Level, s: Level, mean: Tensor | float, std: float) -> Tensor:
    """Follow the exact trajectory of data ~ N(mean, std^2) from t to s: the standardized score of x stays."""
    spread = ((s.alpha**2 * std**2 + s.sigma**2) / (t.alpha**2 * std**2 + t.sigma**2)).sqrt()
    return s.alpha * mean + spread * (x - t.alpha * mean)


def exact_x0(x: Tensor, t: Level, s: Level, mean: Tensor, std: float) -> Tensor:
    """Return the x0 from which the jump from t, x_s = alpha_s x0 + sigma_s eps, follows the exact trajectory to s."""
    ratio = s.sigma / t.sigma
    return (exact_map(x, t, s, mean, std) - ratio * x) / (s.alpha - ratio * t.alpha)


def level(sigma: Tensor) -> Level:
    return Level(1 - sigma, sigma)


class Network(nn.Module):
    """Predicts a velocity: the exact one of the teacher, and for the student a correction that begins at zero.

    The correction of x0 is a x + b, where (a, b) is a function of the times alone, as it is in the exact map.
    """

    def __init__(self, std: float, shift: float, dtype: Any = None, device: Any = None, operations: Any = None) -> None:
        super().__init__()
        self.std, self.shift, self.dtype = std, shift, torch.float32
        self.time_embed = nn.Sequential(nn.Linear(CHANNELS, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.hidden, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        generator = torch.Generator().manual_seed(0)
        for layer in (self.time_embed[0], self.time_embed[2], self.hidden):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, **_: Any) -> Tensor:
        sigma = timestep.view(-1, 1, 1, 1) / 1000
        x0 = exact_x0(x, level(sigma), level(self.target(sigma)), context.view(-1, 1, 1, 1), self.std)
        hidden = functional.silu(self.time_embed(sinusoid(timestep, CHANNELS)))
        a, b = self.out(functional.silu(self.hidden(hidden))).view(-1, 2, 1, 1, 1).unbind(1)
        return (x - (x0 + a * x + b)) / sigma

    def target(self, sigma: Tensor) -> Tensor:
        """Return the sigma after one solver step: SKIP thousandths on the clock before the shift."""
        u = sigma / (self.shift - (self.shift - 1) * sigma) - SKIP / 1000
        return self.shift * u.clamp(min=0) / (1 + (self.shift - 1) * u.clamp(min=0))


class ExactNetwork(Network):
    """A student that knows the exact map: it takes the target time and the guided mean in the adapter's state."""

    model: HostModel

    def target(self, sigma: Tensor) -> Tensor:
        if self.model.adapter.state != STUDENT:
            return super().target(sigma)
        _, s = self.model.adapter.times
        return s.view(-1, 1, 1, 1) / 1000

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, **options: Any) -> Tensor:
        scale = GUIDANCE if self.model.adapter.state == STUDENT else 1
        return super().forward(x, timestep, scale * context, **options)


def model_of(network: type[Network], std: float, shift: float) -> HostModel:
    """Return a model of the host with CONST sampling, loaded as any other."""

    class Settings(comfy.supported_models_base.BASE):
        unet_config = {"std": std, "shift": shift}
        unet_extra_config = {}
        sampling_settings = {"shift": shift}
        latent_format = comfy.latent_formats.LatentFormat

    settings = Settings({"std": std, "shift": shift})
    base = comfy.model_base.BaseModel(settings, comfy.model_base.ModelType.FLOW, unet_model=network)
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)
    model = HostModel(patcher, "time_embed.2", LatentFormat(channels=4, stride=8))
    if isinstance(model.network, ExactNetwork):
        object.__setattr__(model.network, "model", model)
    return model


def config_of(**method: Any) -> Config:
    return from_mapping(
        {
            "base": {"path": "none"},
            "data": {"folder": "none", "caption_dropout": 0.0},
            "method": {
                "target_time": True,
                "origin_steps": 20,
                "skip": SKIP,
                "guidance_min": GUIDANCE,
                "guidance_max": GUIDANCE,
                "distance": "l2",
                "weighting": "gap",
                "diagonal": 0.0,
                "to_clean": 0.0,
                "ema_decay": 0.0,
                **method,
            },
            "adapter": {"rank": 32, "alpha": 32.0, "targets": ["hidden", "out"]},
            "training": {
                "steps": 400,
                "batch": 64,
                "lr": 1e-2,
                "target_time_lr": 1e-2,
                "weight_decay": 0.0,
                "device": "cpu",
            },
            "output": {"folder": "none"},
        }
    )


def dataset_of(std: float) -> Dataset:
    """Return latents [4, 2, 2] of the data, with one caption, whose only number is the mean; the empty one has 0."""
    generator = torch.Generator().manual_seed(0)
    latents = {
        "mean": GUIDANCE * MEAN + std * torch.randn(PICTURES, 4, 2, 2, generator=generator),
        "sizes": torch.tensor([16, 16, 0, 0, 16, 16]).expand(PICTURES, -1),
    }
    captions = {"cross_attn": torch.tensor([0.0, MEAN]).view(2, 1, 1)}
    table = Table(torch.tensor([(0, row, 0, 1) for row in range(PICTURES)]), [latents], [captions])

    def collate(rows: list[Conditioning], framing: Framing) -> Conditioning:
        return join(rows)

    return Dataset((Group(Size(16, 16), PICTURES, 1.0),), [table], caption_of(captions, 0), collate)


def student_of(network: type[Network], std: float, shift: float, config: Config) -> HostModel:
    model = model_of(network, std, shift)
    model.adapter.add(STUDENT, initial_weights(model, config))
    return model


@each_shift
@each_std
@pytest.mark.parametrize("shares", [{}, {"diagonal": 0.5}, {"to_clean": 0.5}, {"diagonal": 0.25, "to_clean": 0.25}])
@torch.no_grad()
def test_the_loss_of_the_exact_map_is_zero(std: float, shift: float, shares: dict[str, float]) -> None:
    config, dataset = config_of(**shares), dataset_of(std)
    exact, untrained = (student_of(kind, std, shift, config) for kind in (ExactNetwork, Network))
    for step in range(3):
        examples = read_examples(config, dataset, exact.schedule, step, slice(0, 32))
        assert step_losses(exact, examples, config.method).max() < 1e-10
        assert step_losses(untrained, examples, config.method).mean() > 1e-3


@each_shift
@each_std
def test_training_reaches_the_exact_map(std: float, shift: float) -> None:
    config = config_of(diagonal=0.25, to_clean=0.25)
    model = student_of(Network, std, shift, config)
    cond = join([Conditioning({"cross_attn": torch.tensor(MEAN).view(1, 1, 1)})] * 16)
    noise = initial_noise(3, (16, 4, 2, 2))
    expected = GUIDANCE * MEAN + std * noise  # the end of the trajectory of each noise

    def errors() -> dict[int, float]:
        found = {}
        for steps in (1, 2, 4):
            sigmas = model.schedule.sigmas_for(steps)
            x0 = sample_latents(model, cond, sigmas=sigmas, gamma=0.0, noise=noise, seed=0)
            found[steps] = float((x0 - expected).square().mean().sqrt())
        return found

    before = errors()
    train(model, dataset_of(std), config)
    after = errors()
    for steps in (1, 2, 4):
        assert after[steps] < 0.05 < 0.5 < before[steps]
