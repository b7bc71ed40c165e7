"""Latents that the teacher draws: an independent solver's, and near the end of the exact trajectory."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from tiny_base import context, model_of, write_base
from trajectory_consistency.tcd import (
    DiscreteSchedule,
    Level,
    TimePoint,
    jump,
    scaled_linear_alpha_bar,
    timestep_grid,
    vp_level,
    zero_terminal_snr,
)
from trajectory_consistency.tcd.distill.teacher_sampling import dpm_solver_sample
from trajectory_consistency.tcd.randomness import generator
from trajectory_consistency.trainer.config import settings as config
from trajectory_consistency.trainer.data import encode
from trajectory_consistency.trainer.data.cache import open_cached
from trajectory_consistency.trainer.data.dataset import Dataset
from trajectory_consistency.trainer.data.store import digest
from trajectory_consistency.trainer.models.seam import Model
from trajectory_consistency.trainer.models.unet.checkpoint import UNetCheckpoint
from trajectory_consistency.trainer.models.unet.model import UNetModel

CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base.safetensors")


def noise(count: int = 2) -> torch.Tensor:
    return torch.randn((count, 4, 8, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("prediction", "steps"), [("eps", 1), ("eps", 3), ("v", 2), ("v", 6)])
def test_it_is_diffusers_dpm_solver(checkpoint: Path, prediction: str, steps: int) -> None:
    net = model_of(checkpoint)
    net = UNetModel(net.network, net.schedule, prediction)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(1)
    cond, uncond = (context(torch.randn((2, 77, 32), generator=draw)) for _ in range(2))
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        final_sigmas_type="zero",
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction],
    )
    scheduler.set_timesteps(timesteps=timestep_grid(steps))
    x = noise()
    with torch.no_grad():
        for t in scheduler.timesteps:
            free, given = (net.network(x, t, each.tensors["context"]).sample for each in (uncond, cond))
            x = scheduler.step(free + 3.0 * (given - free), t, x).prev_sample
    found = dpm_solver_sample(net, cond, uncond, noise(), steps=steps, guidance=3.0)
    assert ((found - x).norm() / x.norm()).item() < 1e-4


class Gaussian:
    """The exact network of data that are normal with this mean and deviation."""

    mean, deviation = 0.7, 0.4

    def __init__(self, alpha_bar: torch.Tensor) -> None:
        self.alpha_bar, self.schedule = alpha_bar, DiscreteSchedule.from_alpha_bar(alpha_bar)

    def level(self, timestep: int) -> Level:
        return vp_level(self.alpha_bar[timestep].view(1, 1, 1, 1))

    def guided_x0(self, x_t: torch.Tensor, t: TimePoint, *_: Any) -> torch.Tensor:
        return self.x0(x_t, t.level)

    def x0(self, x_t: torch.Tensor, level: Level) -> torch.Tensor:
        alpha, sigma = level
        gain = alpha * self.deviation**2 / (alpha**2 * self.deviation**2 + sigma**2)
        return self.mean + gain * (x_t - alpha * self.mean)

    def follow(self, x: torch.Tensor, t: int, s: int) -> torch.Tensor:
        """The exact trajectory: the standardized value stays."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (self.level(each) for each in (t, s))
        spread_t, spread_s = (
            (a**2 * self.deviation**2 + b**2) ** 0.5 for a, b in ((alpha_t, sigma_t), (alpha_s, sigma_s))
        )
        return alpha_s * self.mean + spread_s / spread_t * (x - alpha_t * self.mean)


@pytest.mark.parametrize("terminal", ["usual", "zero"])
def test_it_ends_nearer_to_the_exact_trajectory_than_ddim(terminal: str) -> None:
    alpha_bar = scaled_linear_alpha_bar()
    exact = Gaussian(zero_terminal_snr(alpha_bar) if terminal == "zero" else alpha_bar)
    x, nothing = noise().double(), context(torch.zeros(2, 1, 1))
    errors = {}
    for steps in (10, 25):
        grid = timestep_grid(steps)
        last = exact.level(grid[-1])
        wanted = exact.x0(exact.follow(x, grid[0], grid[-1]), last)
        found = dpm_solver_sample(cast(Model, exact), nothing, nothing, x, steps=steps, guidance=1.0)
        ddim = x
        for t, s in zip(grid, grid[1:], strict=False):
            ddim = jump(ddim, exact.x0(ddim, exact.level(t)), exact.level(t), exact.level(s))
        errors[steps] = (found - wanted).abs().max().item()
        assert errors[steps] < 0.3 * (exact.x0(ddim, last) - wanted).abs().max().item()
    assert errors[25] < 0.4 * errors[10] < 0.05


def prompts(checkpoint: Path, folder: Path, text: str, **draw: object) -> config.Config:
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text(text, encoding="utf-8")
    data = {"prompts": str(folder / "prompts.txt"), "resolution": 64, "draw": {"steps": 2, **draw}}
    return config.from_mapping({"base": {"path": str(checkpoint)}, "data": data, "output": {"folder": str(folder)}})


def drawn(settings: config.Config) -> list[torch.Tensor]:
    dataset = encode.load_or_encode(settings, CPU, FLOAT)
    return [table.latents[shard]["mean"][row] for table in dataset.tables for shard, row, *_ in table.index.tolist()]


def test_prompts_alone_are_enough_and_what_is_drawn_is_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = prompts(checkpoint, tmp_path / "p", "a red square\na blue star\n", per_prompt=2)
    first = drawn(settings)
    assert len(first) == 4 and len({tuple(each.flatten().tolist()) for each in first}) == 4
    cached = open_cached(settings, FLOAT)
    assert cached is not None and isinstance(cached.dataset, Dataset)
    batch = cached.dataset.batch(0, 4, seed=0, caption_dropout=0.0)
    assert sorted(map(str, batch.latents.half().tolist())) == sorted(str(each.tolist()) for each in first)
    for name in ("load_autoencoder", "load_text_encoder", "load"):
        monkeypatch.setattr(UNetCheckpoint, name, None)
    monkeypatch.setattr(encode, "dpm_solver_sample", None)
    again = drawn(settings)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    fewer = drawn(prompts(checkpoint, tmp_path / "p", "a blue star\n", per_prompt=1))  # nothing is drawn anew
    assert len(fewer) == 1 and any(torch.equal(fewer[0], each) for each in first)


def test_a_drawing_is_a_function_of_its_prompt_and_number(checkpoint: Path, tmp_path: Path) -> None:
    (found,) = drawn(prompts(checkpoint, tmp_path / "a", "a red square\n", guidance=4.0))
    key = digest(b"0 a red square")
    start = torch.randn((1, 4, 8, 8), generator=generator(0, f"drawing {key.hex()}"))
    cond, uncond = (
        UNetCheckpoint(config.BaseConfig(path=str(checkpoint))).load_text_encoder(CPU).encode(["a red square", ""])
    )
    expected = dpm_solver_sample(model_of(checkpoint), cond, uncond, start, steps=2, guidance=4.0)
    torch.testing.assert_close(found.float(), expected[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("change", [{"steps": 3}, {"guidance": 2.0}], ids=str)
def test_another_solver_draws_anew(checkpoint: Path, tmp_path: Path, change: dict[str, object]) -> None:
    one, other = (drawn(prompts(checkpoint, tmp_path / "p", "a red square\n", **draw)) for draw in ({}, change))
    assert not torch.equal(one[0], other[0])
