"""The main job on the embedded tiny model: distill a LoRA, draw with it, measure, and show it in a grid.

    python -m trajectory_consistency.trainer.demo --out demo-out

Needs no download and no GPU.  Where a ComfyUI is found, it draws a row too, from the same files.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import settings as config
from ..errors import UserError
from ..run import run
from ..tiny import world
from ..views.grid import Row, draw_grid
from .classifier import train_classifier, world_sample
from .comfy_row import draw_in_comfy
from .comfy_server import Host, HostNotFoundError, find_host
from .methods import IN_COMFY, METHODS, TEACHER_GUIDANCE, Method, Studio
from .metrics import evaluate, noise_floor

COLUMNS = 8
LORA = "tcd-lora.safetensors"
REFERENCE = 4096  # held-out pictures of the world that every row is measured against
WORLD = "Fresh data"
COMFY_TOLERANCE = 1e-4
CHECKED = "TCD S+, 4 steps"
LEAST_ACCURACY = 0.5  # of that row; a run that distills nothing ends near 0
# The learning rates that served best in docs/quality.md, and the weighting, for the network that gets s.
RECIPES: dict[str, tuple[dict[str, Any], float]] = {
    "target-time": ({"law": "uniform", "weighting": "x0", "target_time": True}, 1e-3),
    "tcd": ({"law": "uniform"}, 1e-3),
    "lcm": ({"law": "zero"}, 1e-3),
}
log = logging.getLogger("trajectory-consistency")


class DemoError(RuntimeError):
    """Something in the demo did not come out as it must."""


def main() -> int:
    """Run the demo; return 0, 1 when something came out wrong, 2 for a folder that is not the demo's."""
    parser = argparse.ArgumentParser(
        prog="python -m trajectory_consistency.trainer.demo", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the grid, the LoRA and the metrics")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=350, help="training steps of each LoRA")
    parser.add_argument("--samples", type=int, default=256, help="pictures that each row is measured on")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        unfinished = _begin(options.out)
        demo(unfinished, seed=options.seed, steps=options.steps, samples=options.samples)
        _finish(unfinished, options.out)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except DemoError as error:
        sys.stderr.write(f"error: {error}; what was made is in {unfinished}\n")
        return 1
    log.info("look at %s", options.out / "grid.png")
    return 0


def _begin(out: Path) -> Path:
    """The folder to work in until all is done: an earlier result in `out` stays as it is until then."""
    if out.exists() and not (out / "metrics.json").is_file():
        raise UserError(f"{out} exists and is not a folder of this demo: choose another with --out")
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished


def _finish(unfinished: Path, out: Path) -> None:
    """Put the finished folder in the place of an earlier one."""
    if out.exists():
        shutil.rmtree(out)
    unfinished.rename(out)


def demo(out: Path, *, seed: int, steps: int, samples: int) -> None:
    """Distill, draw, measure and show, into the folder `out`; raises DemoError when the result is not as it must be."""
    host = _host()
    world.write_folder(out / "data", 1024, seed)
    loras = {name: _distill(name, out, seed=seed, steps=steps) for name in RECIPES}
    shutil.copyfile(loras["target-time"], out / LORA)
    classifier = train_classifier(seed)
    scenes = world.random_scenes(samples, seed + 1)
    captions = [scene.caption for scene in scenes]
    reference = classifier.features(world_sample(REFERENCE, purpose="reference", seed=seed)[0])
    studio = Studio(loras, captions)
    metrics: dict[str, Any] = {WORLD: noise_floor(classifier, scenes, reference, seed=seed)}
    fresh = world.draw_pictures(scenes[:COLUMNS], random.Random(seed))
    rows = [Row(f"{WORLD}\nthe noise floor", fresh, _numbers(metrics[WORLD]))]
    for method in METHODS:
        pictures = studio.pictures(method, samples, seed)
        metrics[method.label] = evaluate(classifier, pictures, scenes, reference)
        rows.append(Row(f"{method.label}\n{method.detail}", pictures[:COLUMNS], _numbers(metrics[method.label])))
    if host is not None:
        for method, pictures, difference in _comfy_rows(host, studio, out / LORA, captions[:COLUMNS], seed):
            metrics[f"ComfyUI, {method.label}"] = {"relative difference of latents": difference}
            rows.append(Row(f"{method.label}\ndrawn by ComfyUI", pictures))
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    draw_grid(rows, captions[:COLUMNS], "One caption and one starting noise to a column").save(out / "grid.png")
    _check(metrics)


def _distill(name: str, out: Path, *, seed: int, steps: int) -> Path:
    """Distill the tiny base by one method, through the same call as `tcd-train run`."""
    method, lr = RECIPES[name]
    return run(
        config.from_mapping(
            {
                "base": {"path": "tiny"},
                "data": {
                    "folder": str(out / "data"),
                    "resolution": world.SIZE_PX,
                    "cache": str(out / "cache"),
                },
                "method": {
                    **method,
                    "guidance_min": TEACHER_GUIDANCE,
                    "guidance_max": TEACHER_GUIDANCE,
                    "ema_decay": 0.95,
                    "huber_c": 0.03,
                },
                "adapter": {"rank": 32, "alpha": 32.0},
                "training": {"steps": steps, "batch": 32, "lr": lr, "warmup_steps": 10, "seed": seed},
                "output": {"folder": str(out / name), "name": f"{name}-lora"},
            }
        )
    )


def _comfy_rows(
    host: Host, studio: Studio, lora: Path, captions: list[str], seed: int
) -> Iterator[tuple[Method, Tensor, float]]:
    """Draw the captions in ComfyUI: by what method, its pictures, and how far its latents are from the trainer's."""
    log.info("drawing in ComfyUI, %s", host.folder)
    steps, eta = [method.steps for method in IN_COMFY], IN_COMFY[0].gamma
    for method, drawn in zip(
        IN_COMFY, draw_in_comfy(host, lora, captions, seed=seed, steps=steps, eta=eta), strict=True
    ):
        ours = studio.latents(method, len(captions), seed)
        yield method, drawn.pictures, ((drawn.latents - ours).norm() / ours.norm()).item()


def _host() -> Host | None:
    try:
        return find_host()
    except HostNotFoundError as error:
        log.info("no row by ComfyUI: %s", error)
        return None


def _numbers(measured: Mapping[str, Any]) -> dict[str, str]:
    return {"Frechet\ndistance": f"{measured['frechet']:.2f}", "right\ncaptions": f"{measured['accuracy']:.0%}"}


def _check(metrics: Mapping[str, Any]) -> None:
    """Raise DemoError when ComfyUI draws something else than the trainer, or the student draws too little right."""
    for label, measured in metrics.items():
        difference = measured.get("relative difference of latents", 0.0)
        if not difference <= COMFY_TOLERANCE:
            allowed = f"(allowed: {COMFY_TOLERANCE:.0e})"
            raise DemoError(f"{label}: the latents are {difference:.1e} from the trainer's own {allowed}")
    accuracy = metrics[CHECKED]["accuracy"]
    if accuracy < LEAST_ACCURACY:
        raise DemoError(f"{CHECKED}, draws {accuracy:.0%} of its captions rightly (least: {LEAST_ACCURACY:.0%})")


if __name__ == "__main__":
    sys.exit(main())
