"""The second world: the demo's captioned shapes, with its tiny text-to-image model as the teacher.

Each student is a LoRA, distilled by `tcd-train run`'s own code from the same pictures. What is measured is measured in
the features of the demo's classifier, between what a student draws and pictures that the world itself drew.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measures import Points, coverage, edge_strength, energy_distance, fine_detail
from methods import FRESH_NOISE, METHODS, SEEDS, STEPS, TUNED_AT, VARIATIONS, Method, cells
from safetensors.torch import load_file, save_file
from torch import Tensor

from trajectory_consistency.tcd import TimePoint, add_noise, jump, timestep_grid
from trajectory_consistency.tcd.adapter import FILE
from trajectory_consistency.trainer.atomic import atomic_write
from trajectory_consistency.trainer.config import settings as config
from trajectory_consistency.trainer.demo import methods as demo
from trajectory_consistency.trainer.demo.classifier import Classifier, train_classifier, world_sample
from trajectory_consistency.trainer.demo.metrics import caption_accuracy
from trajectory_consistency.trainer.files.adapter_weights import load_weights
from trajectory_consistency.trainer.models.teacher_sampling import dpm_solver_sample
from trajectory_consistency.trainer.run import run
from trajectory_consistency.trainer.tiny import world
from trajectory_consistency.trainer.views.grid import Row, draw_grid

NAME = "shapes"
TUNED: Mapping[str, Method] = METHODS
OTHERS: Mapping[str, Method] = {name: VARIATIONS[name] for name in ("TCD, weighting x0", "TCD S+, weighting x0")}
LEARNING_RATES = (3e-4, 1e-3)
ITERATIONS, TRY_ITERATIONS, BATCH = 1000, 350, 32
SCENES = world.all_scenes()
CAPTIONS = [scene.caption for scene in SCENES]
PICTURES = len(SCENES)
"""Of each cell of the tables: one for each thing that a caption can say, so that chance has no hand in the captions."""
REFERENCES, TEACHERS, FOLLOWED = 6, 2, 32
"""Pictures of each caption by the world and by the teacher, and of each start of a trajectory."""
COLUMNS, DRAWN = 8, (1, 2, 4, 32)
"""Pictures in a row, and numbers of steps, of what is shown."""


class Measured(NamedTuple):
    """What pictures of the world and of the teacher are in the classifier's features."""

    reference: Points
    teacher: Points


def load_or_encode(folder: Path) -> None:
    """Make what all runs share: the pictures, the classifier, the teacher's pictures and trajectories."""
    if not (folder / "pictures").exists():
        world.write_folder(folder / "pictures.unfinished", 1024, seed=0)
        (folder / "pictures.unfinished").rename(folder / "pictures")
    teacher_features(folder)
    trajectories(folder)


def distill(method: Method, lr: float, seed: int, folder: Path, iterations: int = ITERATIONS) -> Path:
    """Train a student by a method, or have it as it was trained before, and return its LoRA file."""
    settings = config.from_mapping(
        {
            "base": {"path": "tiny"},
            "data": {
                "folder": str(folder / "pictures"),
                "resolution": world.SIZE_PX,
                "cache": str(folder / "cache"),
            },
            "method": {
                **method.settings,
                "guidance_min": demo.TEACHER_GUIDANCE,
                "guidance_max": demo.TEACHER_GUIDANCE,
            },
            "adapter": {"rank": 32, "alpha": 32.0},
            "training": {"steps": iterations, "batch": BATCH, "lr": lr, "warmup_steps": 10, "seed": seed},
            "output": {"folder": str(folder / f"{method.name}-{lr:g}-{seed}-{iterations}"), "name": "lora"},
        }
    )
    return settings.lora_path if settings.lora_path.exists() else run(settings)


@cache
def measured(folder: Path) -> Measured:
    features = classifier(folder).features(pictures_of(SCENES * REFERENCES, "reference"))
    return Measured(
        Points(features, kinds(REFERENCES)),
        Points(teacher_features(folder), kinds(TEACHERS)),
    )


def kinds(rounds: int) -> Tensor:
    """Which caption each picture of `rounds` times all is of."""
    return torch.arange(PICTURES).repeat(rounds)


def teacher_features(folder: Path) -> Tensor:
    """Features of what the teacher draws in 50 steps."""
    path = folder / "teacher.safetensors"
    if not path.exists():
        row = demo.Method("teacher", None, 50, 0.0)
        drawn = demo.DemoSampler({}, CAPTIONS * TEACHERS).pictures(row, PICTURES * TEACHERS, 40_000)
        with atomic_write(path) as unfinished:
            save_file({"features": classifier(folder).features(drawn)}, unfinished)
    return load_file(path)["features"]


def measure_pictures(pictures: Tensor, folder: Path) -> dict[str, float]:
    """What is reported of pictures [N, 3, H, W], one for each caption."""
    against, features = measured(folder), classifier(folder).features(pictures)
    points = Points(features, kinds(1))
    return {
        "distance": energy_distance(points, against.reference),
        "from_teacher": energy_distance(points, against.teacher),
        "covered": coverage(points, against.reference),
        "right": caption_accuracy(classifier(folder), features, SCENES)[0],
        "detail": fine_detail(pictures),
        "edges": edge_strength(pictures),
    }


def try_out(method: Method, lr: float, seed: int, folder: Path) -> list[float]:
    """The distances by which learning rates are chosen, after a shorter training."""
    lora = distill(method, lr, seed, folder, TRY_ITERATIONS)
    found = measure_cells(lora, [(steps, method.gamma) for steps in TUNED_AT], seed, folder)
    return [each["distance"] for each in found.values()]


def measure(method: Method, lr: float, seed: int, folder: Path) -> dict[str, Any]:
    """Everything that is reported of a student: of its samples by "steps gamma", and of its jumps by "t s"."""
    lora = distill(method, lr, seed, folder)
    return {
        "samples": measure_cells(lora, cells(method, most=TUNED_AT[-1]), seed, folder),
        "trajectory": trajectory_errors(lora, folder),
    }


def measure_cells(lora: Path, wanted: list[tuple[int, float]], seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """What is reported of a student's samples, by "steps gamma"."""
    studio, found = demo.DemoSampler({"student": lora}, CAPTIONS), {}
    for steps, gamma in wanted:
        row = demo.Method(f"{steps} steps", "student", steps, gamma)
        pictures = studio.pictures(row, PICTURES, 20_000 + 1000 * seed)
        found[f"{steps} {gamma:g}"] = measure_pictures(pictures, folder)
    return found


def measure_references(seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """The same of fresh pictures, and of the teacher by two solvers and the TCD sampler; its jumps are "DDIM"."""
    found = {"fresh data": measure_pictures(pictures_of(SCENES, f"fresh {seed}"), folder)}
    found["DDIM"] = trajectory_errors(None, folder)
    studio, start = demo.DemoSampler({}, CAPTIONS), 20_000 + 1000 * seed
    samplers = {"DDIM": 0.0, **{f"TCD, γ {gamma:g}": gamma for gamma in FRESH_NOISE}}
    for steps in (*STEPS, 50):
        for sampler, gamma in samplers.items():
            row = demo.Method(f"{sampler} {steps}", None, steps, gamma)
            found[row.label] = measure_pictures(studio.pictures(row, PICTURES, start), folder)
        if steps > TUNED_AT[-1]:
            continue  # where it is DDIM's own distance
        latents = dpm_solver_sample(
            studio.model,
            studio.cond,
            studio.guidance.uncond,
            demo.noise_for(start, PICTURES),
            steps=steps,
            guidance=studio.guidance.scale,
        )
        found[f"DPM-Solver++(2M) {steps}"] = measure_pictures(studio.autoencoder.decode(latents), folder)
    return found


def _followed() -> tuple[demo.DemoSampler, Tensor]:
    """What trajectories are followed of: captions, encoded, and the latents of pictures of them."""
    pictures, scenes = world_sample(FOLLOWED, purpose="trajectories", seed=0)
    studio = demo.DemoSampler({}, [scene.caption for scene in scenes])
    return studio, studio.autoencoder.encode(pictures).mean


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


def draw(lr: Mapping[str, float], folder: Path, path: Path) -> None:
    """Draw some captions by each method, by its learning rate, in rows of numbers of steps, under the teacher's."""
    captions = [scene.caption for scene in world.random_scenes(COLUMNS, 1)]
    loras = {name: distill(METHODS[name], rate, SEEDS[0], folder) for name, rate in lr.items()}
    studio = demo.DemoSampler(loras, captions)
    rows = [demo.Method("Teacher", None, steps, 0.0) for steps in (50, 4)]
    rows += [demo.Method(name, name, steps, METHODS[name].gamma) for name in lr for steps in DRAWN]
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


def pictures_of(scenes: list[world.Scene], purpose: str) -> Tensor:
    """Pictures of scenes by the world itself, apart from those of any other purpose."""
    return world.draw_pictures(scenes, random.Random(purpose))
