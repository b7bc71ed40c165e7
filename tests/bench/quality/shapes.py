"""The second world: the demo's captioned shapes, with its tiny text-to-image model as the teacher.

Each student is a LoRA, distilled by `tcd-train run`'s own code from the same pictures. What is measured is measured in
the features of the demo's classifier, between what a student draws and pictures that the world itself drew.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from measures import coverage, edge_strength, fine_detail
from methods import CELLS, FRESH_NOISE, METHODS, PLAIN, SEEDS, STEPS, TUNED_AT, VARIATIONS, Method
from safetensors.torch import load_file, save_file
from torch import Tensor

from trajectory_consistency.tcd import TimePoint, add_noise, jump, timestep_grid
from trajectory_consistency.tcd.adapter import FILE
from trajectory_consistency.tcd.distill.teacher_sampling import dpm_solver_sample
from trajectory_consistency.tcd.files.atomic import atomic_write
from trajectory_consistency.trainer.demo import distill as demo_distill
from trajectory_consistency.trainer.demo import methods as demo
from trajectory_consistency.trainer.demo.classifier import Classifier, scene_labels, train_classifier
from trajectory_consistency.trainer.demo.metrics import Judge, world_pictures
from trajectory_consistency.trainer.files.adapter_weights import load_weights
from trajectory_consistency.trainer.tiny import world
from trajectory_consistency.trainer.views.grid import Row, draw_grid

NAME = "shapes"
TUNED = METHODS
OTHERS_SEEDS = SEEDS[:1]
OTHERS = {
    name: (PLAIN | VARIATIONS)[name] for name in ("TCD S+, diagonal, plain", "TCD S+, diagonal, Huber, c = 0.001")
}
"""The variations that choose settings. The other world, where a run takes seconds, has all of them."""
LEARNING_RATES = (3e-4, 1e-3)
ITERATIONS, TRY_ITERATIONS, BATCH = 1000, 350, demo_distill.BATCH
PROMPTS = 250
COMPLETE = [world.Prompt(scene, tuple(world.LABELS)) for scene in world.random_scenes(PROMPTS, seed=1)]
OPEN = [prompt for prompt in world.random_prompts(4 * PROMPTS, seed=1) if len(prompt.parts) < len(world.LABELS)]
OPEN = OPEN[:PROMPTS]
"""Prompts whose captions say everything, and prompts that leave something open; each cell has a picture of each."""
CAPTIONS = [prompt.caption for prompt in (*COMPLETE, *OPEN)]
REFERENCES, TEACHERS, FOLLOWED = 8, 6, 32
"""Pictures of each prompt by the world and by the teacher, and of each start of a trajectory."""
COLUMNS, DRAWN = 8, (1, 2, 4, 32)
"""Pictures in a row, and numbers of steps, of what is shown."""


def prepare(folder: Path) -> None:
    """Make what all runs share: the pictures, the classifier, the teacher's pictures and trajectories."""
    demo_distill.write_pictures(folder)
    classifier(folder)
    teacher_pictures(folder)
    trajectories(folder)


def distill(method: Method, lr: float, seed: int, folder: Path, iterations: int = ITERATIONS) -> Path:
    """Train a student by a method, or have it as it was trained before, and return its LoRA file."""
    out = folder / f"{method.name}-{lr:g}-{seed}-{iterations}"
    return demo_distill.distill(method.settings, out, shared=folder, lr=lr, steps=iterations, seed=seed)


@cache
def judges(folder: Path) -> tuple[Judge, Judge]:
    """What pictures of COMPLETE and of OPEN are compared with."""
    of_teacher = teacher_pictures(folder).unflatten(0, (TEACHERS, len(CAPTIONS)))

    def judge(prompts: list[world.Prompt], teacher: Tensor) -> Judge:
        drawn = world_pictures(prompts, REFERENCES, "reference")
        return Judge(classifier(folder), prompts, world=drawn, teacher=teacher.flatten(0, 1))

    return judge(COMPLETE, of_teacher[:, :PROMPTS]), judge(OPEN, of_teacher[:, PROMPTS:])


def teacher_pictures(folder: Path) -> Tensor:
    """What the teacher draws in 50 steps, uint8 [TEACHERS * 2 * PROMPTS, 3, H, W]."""
    path = folder / "teacher.safetensors"
    if not path.exists():
        row = demo.Method("teacher", None, 50, 0.0)
        drawn = demo.DemoSampler({}, CAPTIONS * TEACHERS).pictures(row, len(CAPTIONS) * TEACHERS, 40_000)
        with atomic_write(path) as unfinished:
            save_file({"pictures": drawn.contiguous()}, unfinished)
    return load_file(path)["pictures"]


def unevenness(folder: Path) -> float:
    """Return the largest difference of a value's share among the teacher's pictures from its share in the world.

    A picture counts where its caption leaves the part open, such as the color in "a star on a dotted background".
    """
    _, judge = judges(folder)
    drawn = judge.classifier.labels(judge.teacher.at).unflatten(0, (TEACHERS, PROMPTS))
    largest = 0.0
    for k, (name, values) in enumerate(world.LABELS.items()):
        silent = [row for row, prompt in enumerate(OPEN) if name not in prompt.parts]
        allowed = [scene_labels(OPEN[row].scenes())[:, k] for row in silent]
        expected = torch.stack([torch.bincount(each, minlength=len(values)) / len(each) for each in allowed]).mean(0)
        found = torch.bincount(drawn[:, silent, k].flatten(), minlength=len(values)) / (TEACHERS * len(silent))
        largest = max(largest, (found - expected).abs().max().item())
    return largest


def fresh_pictures(purpose: str) -> Tensor:
    """What the world draws, in the order of CAPTIONS."""
    return torch.cat([world_pictures(prompts, 1, purpose) for prompts in (COMPLETE, OPEN)])


def measure_pictures(pictures: Tensor, folder: Path) -> dict[str, float]:
    """What is reported of pictures [N, 3, H, W], in the order of CAPTIONS."""
    found: dict[str, float] = {"detail": fine_detail(pictures), "edges": edge_strength(pictures)}
    for prefix, judge, part in zip(("", "open_"), judges(folder), pictures.split(PROMPTS), strict=True):
        points, metrics = judge.points(judge.classifier.features(part)), judge.metrics(part)
        found |= {
            f"{prefix}distance": metrics["to_world"],
            f"{prefix}from_teacher": metrics["to_teacher"],
            f"{prefix}right": metrics["accuracy"],
            f"{prefix}covered": coverage(points, judge.world),
        }
    return found


def try_out(method: Method, lr: float, seed: int, folder: Path) -> list[float]:
    """The distances by which learning rates are chosen, after a shorter training."""
    lora = distill(method, lr, seed, folder, TRY_ITERATIONS)
    found = measure_cells(lora, [(steps, method.gamma) for steps in TUNED_AT], seed, folder)
    return [each["distance"] for each in found.values()]


def measure(method: Method, lr: float, seed: int, folder: Path) -> dict[str, Any]:
    """Everything that is reported of a student: of its samples by "steps gamma", and of its jumps by "t s"."""
    lora = distill(method, lr, seed, folder)
    return {
        "samples": measure_cells(lora, CELLS, seed, folder),
        "trajectory": trajectory_errors(lora, folder),
    }


def measure_cells(lora: Path, wanted: list[tuple[int, float]], seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """What is reported of a student's samples, by "steps gamma"."""
    studio, found = demo.DemoSampler({"student": lora}, CAPTIONS), {}
    for steps, gamma in wanted:
        row = demo.Method(f"{steps} steps", "student", steps, gamma)
        pictures = studio.pictures(row, len(CAPTIONS), 20_000 + 1000 * seed)
        found[f"{steps} {gamma:g}"] = measure_pictures(pictures, folder)
    return found


def measure_references(seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """The same of fresh pictures, and of the teacher; its jumps are "DDIM".

    With the first seed, the teacher is sampled by two solvers and the TCD sampler, with the others by DDIM alone: it
    takes as long as three students.
    """
    found = {"fresh data": measure_pictures(fresh_pictures(f"fresh {seed}"), folder)}
    found["DDIM"] = trajectory_errors(None, folder)
    found["teacher"] = {"unevenness": unevenness(folder)}
    studio, start = demo.DemoSampler({}, CAPTIONS), 20_000 + 1000 * seed
    is_first = seed == SEEDS[0]
    samplers = {"DDIM": 0.0, **{f"TCD, γ {gamma:g}": gamma for gamma in FRESH_NOISE if is_first}}
    for steps in (*STEPS, 50):
        for sampler, gamma in samplers.items():
            if gamma > 0 and steps > STEPS[-1]:
                continue
            row = demo.Method(f"{sampler} {steps}", None, steps, gamma)
            found[row.label] = measure_pictures(studio.pictures(row, len(CAPTIONS), start), folder)
        if not is_first or steps > TUNED_AT[-1]:  # with more steps, it is DDIM's own distance
            continue
        latents = dpm_solver_sample(
            studio.model,
            studio.cond,
            studio.guidance.uncond,
            demo.noise_for(start, len(CAPTIONS)),
            steps=steps,
            guidance=studio.guidance.scale,
        )
        found[f"DPM-Solver++(2M) {steps}"] = measure_pictures(studio.autoencoder.decode(latents), folder)
    return found


def _followed() -> tuple[demo.DemoSampler, Tensor]:
    """What trajectories are followed of: captions, encoded, and the latents of pictures of them."""
    prompts = world.random_prompts(FOLLOWED, seed=2)
    studio = demo.DemoSampler({}, [prompt.caption for prompt in prompts])
    return studio, studio.autoencoder.encode(world_pictures(prompts, 1, "trajectories")).mean


def _point(studio: demo.DemoSampler, timestep: int) -> TimePoint:
    return studio.model.schedule.point(torch.full((FOLLOWED,), timestep), 4)


@torch.no_grad()
def trajectories(folder: Path) -> dict[str, Tensor]:
    """Where the guided teacher leads in steps of one timestep, from each of four times to each later one: "t s"."""
    path = folder / "trajectories.safetensors"
    if not path.exists():
        studio, x0 = _followed()
        grid, found = timestep_grid(4), {}
        scale = torch.full((FOLLOWED,), studio.guidance.scale)
        for t in grid:
            eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(t))
            x = found[f"{t} {t}"] = add_noise(x0, eps, _point(studio, t).level)
            for now in range(t, 0, -1):
                here, there = _point(studio, now), _point(studio, now - 1)
                clean = studio.model.guided_x0(x, here, studio.cond, studio.guidance.uncond, scale)
                x = jump(x, clean, here.level, there.level)
                if now - 1 in (*grid, 0):
                    found[f"{t} {now - 1}"] = x
        with atomic_write(path) as unfinished:
            save_file({key: x.contiguous() for key, x in found.items()}, unfinished)
    return load_file(path)


@torch.no_grad()
def trajectory_errors(lora: Path | None, folder: Path) -> dict[str, float]:
    """The root mean square of f(x_t, t -> s) minus where the teacher's trajectory leads, by "t s".

    Without a LoRA, of the teacher's own jump, which is one step of DDIM.
    """
    studio, _ = _followed()
    model, found, errors = studio.model, trajectories(folder), {}
    scale = torch.full((FOLLOWED,), 1.0 if lora else studio.guidance.scale)  # a student has learned the guidance
    if lora:
        model.adapter.add(FILE, load_weights(model, lora))
    for key in sorted(found, key=lambda key: [-int(time) for time in key.split()]):
        start, end = key.split()
        if start == end:
            continue
        x_t, t, s = found[f"{start} {start}"], _point(studio, int(start)), _point(studio, int(end))
        clean = model.guided_x0(x_t, t, studio.cond, studio.guidance.uncond, scale, s)
        x_s = jump(x_t, clean, t.level, s.level)
        errors[key] = (x_s - found[key]).square().mean().sqrt().item()
    return errors


def draw(lr: Mapping[str, float], gamma: Mapping[str, float], folder: Path, path: Path) -> None:
    """Draw some captions by each method, with its learning rate and gamma, in rows of numbers of steps."""
    captions = [prompt.caption for prompt in (*COMPLETE[: COLUMNS // 2], *OPEN[: COLUMNS // 2])]
    loras = {name: distill(METHODS[name], rate, SEEDS[0], folder) for name, rate in lr.items()}
    studio = demo.DemoSampler(loras, captions)
    rows = [demo.Method("Teacher", None, steps, 0.0) for steps in (50, 4)]
    rows += [demo.Method(name, name, steps, gamma[name]) for name in lr for steps in DRAWN]
    grid = [
        Row(
            f"{row.label}, {row.steps} step{'s' if row.steps > 1 else ''}\n{row.detail}",
            studio.pictures(row, COLUMNS, 0),
        )
        for row in rows
    ]
    draw_grid(grid, captions, "One caption and one starting noise to a column").save(path)


@cache
def classifier(folder: Path) -> Classifier:
    path = folder / "classifier.safetensors"
    if not path.exists():
        with atomic_write(path) as unfinished:
            save_file(train_classifier(0).state_dict(), unfinished)
    made = Classifier().eval().requires_grad_(False)
    made.load_state_dict(load_file(path))
    return made
