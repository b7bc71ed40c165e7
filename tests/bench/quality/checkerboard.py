"""The first world: points on a checkerboard, of which everything is known.

Eight narrow Gaussians stand on the black squares of a board of 4 x 4. What a perfect denoiser says of a noisy point is
a formula, and that is the teacher, without guidance. The student is an MLP; it first learns to denoise, as a copy of a
teacher would have, and then is distilled by the trainer's own loss, times and levels. All of its weights are trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from methods import CELLS, FRESH_NOISE, METHODS, PLAIN, SEEDS, STEPS, TUNED_AT, VARIATIONS, Method
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from trajectory_consistency.tcd import (
    DiscreteSchedule,
    TargetInput,
    TargetTime,
    TimePoint,
    add_noise,
    from_x0,
    jump,
    sample_tcd,
    scaled_linear_alpha_bar,
    seeded_noise,
    sigma_to_alpha_bar,
    timestep_grid,
    to_x0,
)
from trajectory_consistency.tcd.distill.optimizer import lr_factor
from trajectory_consistency.tcd.files.atomic import atomic_write
from trajectory_consistency.tcd.objective import Follow, distance_of, first_order, loss_weights, tcd_loss
from trajectory_consistency.tcd.target_time import sinusoid
from trajectory_consistency.tcd.times import Points as TimePoints
from trajectory_consistency.tcd.times import sample_times, share_out
from trajectory_consistency.trainer.demo.metrics import Points, energy_distance

NAME = "checkerboard"
TUNED, OTHERS, OTHERS_SEEDS = METHODS | PLAIN, VARIATIONS, SEEDS[:1]
LEARNING_RATES = (1e-3, 3e-3)
CENTERS = torch.tensor([(x, y) for x in range(4) for y in range(4) if (x + y) % 2], dtype=torch.float32) - 1.5
SPREAD = 0.05  # of each, where two centers are 1.41 apart
SCALE = 1 / math.sqrt(1.25 + SPREAD**2)  # so that the coordinates have unit variance
ITERATIONS, BATCH, WIDTH = 4000, 512, 128
POINTS = 8192
SCHEDULE = DiscreteSchedule.from_alpha_bar(scaled_linear_alpha_bar())

Denoiser = Callable[[Tensor, TimePoint, TimePoint], Tensor]
"""(x_t [B, 2, 1, 1], t, s) -> x0 [B, 2, 1, 1]."""


def point(timesteps: Tensor) -> TimePoint:
    return SCHEDULE.point(timesteps, 4)


def data(count: int, generator: torch.Generator) -> Tensor:
    """Points [count, 2, 1, 1]."""
    which = torch.randint(len(CENTERS), (count,), generator=generator)
    points = CENTERS[which] + SPREAD * torch.randn((count, 2), generator=generator)
    return (SCALE * points).view(-1, 2, 1, 1)


def teacher(x_t: Tensor, t: TimePoint, s: TimePoint | None = None) -> Tensor:
    """E[x0 | x_t], exactly."""
    alpha, sigma = (part.view(-1, 1) for part in t.level)
    x, centers, spread = x_t.flatten(1), SCALE * CENTERS, SCALE * SPREAD
    variance = alpha**2 * spread**2 + sigma**2
    away = x.unsqueeze(1) - alpha.unsqueeze(1) * centers
    share = torch.softmax(-away.square().sum(-1) / (2 * variance), dim=1)
    means = centers + (alpha * spread**2 / variance).unsqueeze(1) * away
    return (share.unsqueeze(-1) * means).sum(1).view_as(x_t)


class Student(nn.Module):
    """An MLP with three hidden layers that predicts v, and gets t and perhaps s."""

    def __init__(self, target_input: TargetInput | None) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(64, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        sizes = (2, WIDTH, WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False))
        self.last = nn.Linear(WIDTH, 2)
        self.target_time = TargetTime(64, WIDTH, target_input=target_input) if target_input else None

    def forward(self, x_t: Tensor, t: TimePoint, s: TimePoint) -> Tensor:
        emb = self.time(sinusoid(t.network_time, 64))
        if self.target_time is not None:
            emb = emb + self.target_time(t.network_time, s.network_time)
        hidden = x_t.flatten(1)
        for layer in self.layers:
            hidden = functional.silu(layer(hidden) + emb)
        return to_x0(self.last(hidden).view_as(x_t), x_t, t.level, "v")


def prepare(folder: Path) -> None:
    """Make what all runs share: the students as they begin."""
    for seed in SEEDS:
        denoiser_of(seed, folder)


def denoiser_of(seed: int, folder: Path) -> dict[str, Tensor]:
    """The weights of a student that knows what the teacher knows, by regression to v: where each method begins."""
    path = folder / f"denoiser-{seed}.safetensors"
    if not path.exists():
        with atomic_write(path) as unfinished:
            save_file(_learn_to_denoise(seed), unfinished)
    return load_file(path)


def _learn_to_denoise(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    student, generator = Student(None), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    for step in range(ITERATIONS):
        x0 = data(BATCH, generator)
        t = point(torch.randint(1000, (BATCH,), generator=generator))
        x_t = add_noise(x0, torch.randn(x0.shape, generator=generator), t.level)
        wrong = from_x0(student(x_t, t, t), x_t, t.level, "v") - from_x0(teacher(x_t, t), x_t, t.level, "v")
        _descend(optimizer, wrong.square().mean(), step, 1e-3)
    return student.state_dict()


def distill(method: Method, lr: float, seed: int, folder: Path) -> Denoiser:
    """Train a student by a method, or have it as it was trained before."""
    path = folder / f"{method.name}-{lr:g}-{seed}.safetensors"
    if not path.exists():
        with atomic_write(path) as unfinished:
            save_file(_train(method, lr, seed, folder).state_dict(), unfinished)
    student = _student(method).eval().requires_grad_(False)
    student.load_state_dict(load_file(path))
    return student


def _train(method: Method, lr: float, seed: int, folder: Path) -> Student:
    start = denoiser_of(seed, folder)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    student, settings = _student(method), method.config
    student.load_state_dict({**student.state_dict(), **start})
    average = deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), lr=lr)
    for step in range(ITERATIONS):
        x0 = data(BATCH, generator)
        eps = torch.randn(x0.shape, generator=generator)
        phases = settings.phases[step * len(settings.phases) // ITERATIONS]
        times = sample_times(
            BATCH,
            schedule=SCHEDULE,
            law=settings.law,
            origin_steps=50,
            skip=20,
            phases=phases,
            generator=generator,
        )
        times = share_out(
            times, step * BATCH, diagonal=settings.diagonal, to_clean=settings.to_clean, highest=999, skip=20
        )
        points = TimePoints(*(point(each) for each in times))
        loss = tcd_loss(
            _follow(student),
            _follow(average if settings.ema_decay else student),
            lambda x_t, t, _: teacher(x_t, t),
            x0,
            eps,
            points,
            target_rows=times.target_rows,
            distance=distance_of(settings.distance, settings.huber_c),
        )
        _descend(optimizer, (loss_weights(points, settings.weighting) * loss).mean(), step, lr)
        for mean, parameter in zip(average.parameters(), student.parameters(), strict=True):
            mean.lerp_(parameter.detach(), 1 - settings.ema_decay)
    return student


def _student(method: Method) -> Student:
    return Student(method.config.embedded_input)


def _follow(student: Student) -> Follow:
    return first_order(student)


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor, step: int, lr: float) -> None:
    optimizer.param_groups[0]["lr"] = lr * lr_factor(step, ITERATIONS, 0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def sample(denoiser: Denoiser, steps: int, gamma: float, seed: int) -> Tensor:
    """Draw POINTS points [N, 2]."""
    sigmas = SCHEDULE.sigmas_for(steps).float()
    x = torch.randn((POINTS, 2, 1, 1), generator=torch.Generator().manual_seed(seed)) * (1 + sigmas[0] ** 2).sqrt()

    def denoise(x: Tensor, sigma: Tensor, sigma_s: Tensor) -> Tensor:
        t, s = (SCHEDULE.point_at(each.expand(len(x)), x.ndim) for each in (sigma, sigma_s))
        return denoiser(x * sigma_to_alpha_bar(sigma).sqrt(), t, s)

    # One stream for all points: to seed each by itself takes longer than the network does.
    noise = seeded_noise(seed)
    return sample_tcd(
        denoise, x, sigmas, schedule=SCHEDULE, gamma=gamma, noise=lambda at, like: noise(at, like[None])[0]
    ).flatten(1)


@torch.no_grad()
def solve(steps: int, seed: int) -> Tensor:
    """Draw points [N, 2] by DPM-Solver++(2M), as diffusers has it, along the teacher's trajectories."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="sample"
    )
    scheduler.set_timesteps(timesteps=timestep_grid(steps))
    x = torch.randn((POINTS, 2, 1, 1), generator=torch.Generator().manual_seed(seed))
    for t in scheduler.timesteps:
        x = scheduler.step(teacher(x, point(t.expand(len(x)))), t, x).prev_sample
    return x.flatten(1)


def coverage(points: Tensor) -> tuple[float, float]:
    """The share of the eight squares that got at least half of their points, and of points that are on no square."""
    away = torch.cdist(points, SCALE * CENTERS).min(1)
    on = away.values < 4 * SCALE * SPREAD
    counts = torch.bincount(away.indices[on], minlength=len(CENTERS))
    return (counts >= POINTS / len(CENTERS) / 2).double().mean().item(), 1 - on.double().mean().item()


class Trajectory(NamedTuple):
    """Where the teacher leads points in steps of one timestep."""

    x_t: Tensor
    t: int
    s: int
    x_s: Tensor


@cache
@torch.no_grad()
def trajectories(seed: int) -> list[Trajectory]:
    """From each time of a sampler of four steps to each later one, and to 0."""
    generator = torch.Generator().manual_seed(seed)
    grid, found = timestep_grid(4), []
    for t in grid:
        x0 = data(1024, generator)
        x_t = x = add_noise(x0, torch.randn(x0.shape, generator=generator), point(torch.tensor([t])).level)
        for now in range(t, 0, -1):
            here, there = (point(torch.full((len(x),), time)) for time in (now, now - 1))
            x = jump(x, teacher(x, here), here.level, there.level)
            if now - 1 in (*grid, 0):
                found.append(Trajectory(x_t, t, now - 1, x))
    return found


@torch.no_grad()
def trajectory_errors(denoiser: Denoiser, seed: int) -> dict[str, float]:
    """The root mean square of f(x_t, t -> s) minus where the teacher's trajectory leads, by "t s"."""
    errors = {}
    for x_t, t, s, x_s in trajectories(seed):
        start, end = (point(torch.full((len(x_t),), time)) for time in (t, s))
        found = jump(x_t, denoiser(x_t, start, end), start.level, end.level)
        errors[f"{t} {s}"] = (found - x_s).square().mean().sqrt().item()
    return errors


def measure_points(points: Tensor, seed: int) -> dict[str, float]:
    """What is reported of points [N, 2]."""
    squares, strays = coverage(points)
    return {"distance": energy_distance(Points(points), _reference(seed)), "covered": squares, "strays": strays}


@cache
def _reference(seed: int) -> Points:
    return Points(data(POINTS, torch.Generator().manual_seed(10_000 + seed)).flatten(1))


def try_out(method: Method, lr: float, seed: int, folder: Path) -> list[float]:
    """The distances by which learning rates are chosen."""
    denoiser = distill(method, lr, seed, folder)
    drawn = [sample(denoiser, steps, method.gamma, 20_000 + seed) for steps in TUNED_AT]
    return [measure_points(points, seed)["distance"] for points in drawn]


def measure(method: Method, lr: float, seed: int, folder: Path) -> dict[str, Any]:
    """Everything that is reported of a student: of its samples by "steps gamma", and of its jumps by "t s"."""
    denoiser = distill(method, lr, seed, folder)
    return {
        "samples": {
            f"{steps} {gamma:g}": measure_points(sample(denoiser, steps, gamma, 20_000 + seed), seed)
            for steps, gamma in CELLS
        },
        "trajectory": trajectory_errors(denoiser, 30_000 + seed),
    }


def measure_references(seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """The same of fresh data, and of the teacher by two solvers and the TCD sampler; its jumps are "DDIM"."""
    fresh = data(POINTS, torch.Generator().manual_seed(40_000 + seed)).flatten(1)
    found = {"fresh data": measure_points(fresh, seed), "DDIM": trajectory_errors(teacher, 30_000 + seed)}
    for steps in (*STEPS, 50):
        found[f"DDIM {steps}"] = measure_points(sample(teacher, steps, 0.0, 20_000 + seed), seed)
        found[f"DPM-Solver++(2M) {steps}"] = measure_points(solve(steps, 20_000 + seed), seed)
        for gamma in FRESH_NOISE:
            found[f"TCD, γ {gamma:g} {steps}"] = measure_points(sample(teacher, steps, gamma, 20_000 + seed), seed)
    return found


def draw(lr: Mapping[str, float], gamma: Mapping[str, float], folder: Path, path: Path) -> None:
    """Draw points of each method, by its learning rate and gamma, in a row of numbers of steps."""
    from matplotlib import pyplot

    names = ["teacher", *lr]
    figure, panels = pyplot.subplots(
        len(names), len(STEPS), figsize=(12, 2 * len(names)), sharex=True, sharey=True, layout="constrained"
    )
    for name, row in zip(names, panels, strict=True):
        denoiser = teacher if name == "teacher" else distill(TUNED[name], lr[name], SEEDS[0], folder)
        row[0].set_ylabel(f"{name}\nγ = {gamma.get(name, 0.0):g}")
        for steps, panel in zip(STEPS, row, strict=True):
            x, y = sample(denoiser, steps, gamma.get(name, 0.0), seed=0).T
            panel.scatter(x, y, s=0.4, color="black", linewidths=0)
            panel.set(xlim=(-2, 2), ylim=(-2, 2), xticks=[], yticks=[], aspect="equal")
            if name == "teacher":
                panel.set_title(f"{steps} step{'s' if steps > 1 else ''}")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
