"""The demo: distill LoRAs for the embedded tiny model, sample with them, evaluate the pictures, and draw a grid.

    python -m trajectory_consistency.trainer.demo --out demo-out

It needs no download and no GPU. If a ComfyUI is found, the grid also has rows that ComfyUI sampled with the same LoRA.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..find_comfyui import Host, HostNotFoundError, find_host
from ..tiny import world
from ..views.grid import Row, draw_grid
from .classifier import train_classifier
from .comfy_row import sample_in_comfy
from .distill import distill, write_pictures
from .methods import COMFY_METHODS, METHODS, DemoSampler, Method
from .metrics import Judge, pixel_difference, world_pictures

COLUMNS = 8
STEPS = 600
LORA = "tcd-lora.safetensors"
REFERENCES = 4  # pictures of each caption by the world, from which the distances are measured
WORLD = "Fresh data"
COMFY_TOLERANCE = 1e-4  # relative difference between latents of ComfyUI and of the trainer
# LoRA name -> (method settings, learning rate): the settings that are best in docs/quality.md.
RECIPES: dict[str, tuple[dict[str, Any], float]] = {
    "target-time": (
        {"law": "uniform", "weighting": "x0", "target_time": True, "diagonal": 0.5, "to_clean": 0.15},
        1e-3,
    ),
    "tcd": ({"law": "uniform"}, 1e-3),
    "lcm": ({"law": "zero"}, 1e-3),
}
log = logging.getLogger("trajectory-consistency")


class DemoError(RuntimeError):
    """The demo's result failed a check."""


def main() -> int:
    """Run the demo; return 0, 1 if the result failed a check, or 2 if --out is a folder of something else."""
    parser = argparse.ArgumentParser(
        prog="python -m trajectory_consistency.trainer.demo", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the grid, the LoRA and the metrics")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each LoRA")
    parser.add_argument("--samples", type=int, default=256, help="pictures that each row is evaluated on")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        unfinished = _create_work_folder(options.out)
        demo(unfinished, seed=options.seed, steps=options.steps, samples=options.samples)
        _publish(unfinished, options.out)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except DemoError as error:
        sys.stderr.write(f"error: {error}; the results are in {unfinished}\n")
        return 1
    log.info("look at %s", options.out / "grid.png")
    return 0


def _create_work_folder(out: Path) -> Path:
    """Create an empty folder beside `out` to work in, so that an earlier result is kept until the demo succeeds.

    Raises UserError if `out` exists and is not a result of the demo.
    """
    if out.exists() and not (out / "metrics.json").is_file():
        raise UserError(f"{out} exists and is not a folder of this demo: choose another with --out")
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished


def _publish(unfinished: Path, out: Path) -> None:
    """Move the finished folder to `out`, replacing an earlier result."""
    if out.exists():
        shutil.rmtree(out)
    unfinished.rename(out)


def demo(out: Path, *, seed: int, steps: int, samples: int) -> None:
    """Distill, sample, measure and draw the grid, into the folder `out`; raises DemoError if a check fails."""
    host = _find_host()
    write_pictures(out)
    loras = {
        name: distill(method, out / name, shared=out, lr=lr, steps=steps, seed=seed, name=f"{name}-lora")
        for name, (method, lr) in RECIPES.items()
    }
    shutil.copyfile(loras["target-time"], out / LORA)
    prompts = world.random_prompts(samples, seed + 1)
    captions = [prompt.caption for prompt in prompts]
    sampler = DemoSampler(loras, captions)
    rows, metrics = _measured_rows(sampler, prompts, seed)
    if host is not None:
        for method, pictures, difference in _comfy_rows(host, sampler, out / LORA, captions[:COLUMNS], seed):
            metrics[f"ComfyUI, {method.label}"] = {"relative difference of latents": difference}
            rows.append(Row(f"{method.label}\ndrawn by ComfyUI", pictures, starts_group=method is COMFY_METHODS[0]))
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    draw_grid(rows, captions[:COLUMNS], "One caption and one starting noise to a column").save(out / "grid.png")
    _check_latents(metrics)
    if steps >= STEPS:  # a shorter training, which only tries the demo, makes no good student
        _check_student(metrics)


def _measured_rows(
    sampler: DemoSampler, prompts: Sequence[world.Prompt], seed: int
) -> tuple[list[Row], dict[str, Any]]:
    """Sample all prompts by each method; return the grid's rows, of the first prompts, and metrics by label."""
    count = len(prompts)
    judge = Judge(
        train_classifier(seed),
        prompts,
        world=world_pictures(prompts, REFERENCES, f"reference {seed}"),
        teacher=sampler.pictures(METHODS[0], count, seed + count),  # from other noise than the rows
    )
    fresh = world_pictures(prompts, 1, f"fresh {seed}")
    metrics: dict[str, Any] = {WORLD: judge.metrics(fresh)}
    rows = [Row(f"{WORLD}\ndrawn by the world", fresh[:COLUMNS], _numbers(metrics[WORLD]))]
    last, drawn = None, [sampler.pictures(method, count, seed) for method in METHODS]
    for method, pictures in zip(METHODS, drawn, strict=True):
        metrics[method.label] = {**judge.metrics(pictures), "difference": pixel_difference(pictures, drawn[0])}
        rows.append(
            Row(
                f"{method.label}\n{method.detail}",
                pictures[:COLUMNS],
                _numbers(metrics[method.label]),
                starts_group=method.adapter != last,
            )
        )
        last = method.adapter
    return rows, metrics


def _comfy_rows(
    host: Host, sampler: DemoSampler, lora: Path, captions: list[str], seed: int
) -> Iterator[tuple[Method, Tensor, float]]:
    """Sample the captions in ComfyUI; yield (method, pictures, relative difference of latents from the trainer's)."""
    log.info("drawing in ComfyUI, %s", host.folder)
    steps, eta = [method.steps for method in COMFY_METHODS], COMFY_METHODS[0].gamma
    for method, drawn in zip(
        COMFY_METHODS, sample_in_comfy(host, lora, captions, seed=seed, steps=steps, eta=eta), strict=True
    ):
        ours = sampler.latents(method, len(captions), seed)
        yield method, drawn.pictures, ((drawn.latents - ours).norm() / ours.norm()).item()


def _find_host() -> Host | None:
    try:
        return find_host()
    except HostNotFoundError as error:
        log.info("no row by ComfyUI: %s", error)
        return None


def _numbers(measured: Mapping[str, Any]) -> dict[str, str]:
    """Return the numbers that the grid shows beside a row."""
    difference = measured.get("difference")
    return {
        "difference from\nthe teacher's\npicture": "" if difference is None else f"{difference:.1f}",
        "1000 x distance\nto the world": f"{1000 * measured['to_world']:.1f}",
        "right\ncaptions": f"{measured['accuracy']:.0%}",
    }


def _check_latents(metrics: Mapping[str, Any]) -> None:
    """Raise DemoError if ComfyUI's latents differ from the trainer's."""
    for label, measured in metrics.items():
        difference = measured.get("relative difference of latents", 0.0)
        if not difference <= COMFY_TOLERANCE:  # also if it is NaN
            allowed = f"(allowed: {COMFY_TOLERANCE:.0e})"
            raise DemoError(f"{label}: the latents are {difference:.1e} from the trainer's own {allowed}")


def _check_student(metrics: Mapping[str, Any]) -> None:
    """Raise DemoError if S+ in 4 steps is much further from the teacher's pictures than the teacher itself in 4."""
    student, teacher = (metrics[f"{name}, 4 steps"]["difference"] for name in ("TCD S+", "Teacher"))
    allowed = 1.2 * teacher
    if not student < allowed:  # also if it is NaN
        raise DemoError(
            f"in 4 steps, the pixels of TCD S+ differ by {student:.1f} from those of the teacher in 50 steps "
            f"(expected: less than {allowed:.1f}; the teacher's own differ by {teacher:.1f} in 4 steps)"
        )


if __name__ == "__main__":
    sys.exit(main())
