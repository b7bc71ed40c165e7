"""Do all runs of a world, several at a time in separate processes; results that exist are not computed again."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import checkerboard
import report
import shapes
import torch
from methods import METHODS, PLAIN, SEEDS, TUNING_SEED, VARIATIONS
from tqdm import tqdm

WORLDS = {world.NAME: world for world in (checkerboard, shapes)}
ALL = METHODS | PLAIN | VARIATIONS


def compare(name: str, folder: Path) -> report.Results:
    """Choose each method's learning rate, run it with every seed, and return all results of a world."""
    world = WORLDS[name]
    folder.mkdir(parents=True, exist_ok=True)
    done(folder / "prepared.json", lambda: world.prepare(folder))
    rates = [(method, lr) for method in world.TUNED for lr in world.LEARNING_RATES]
    scores = at_once(f"{name}, tries", partial(try_out, name, folder), rates)
    tries: dict[str, dict[float, float]] = {method: {} for method in world.TUNED}
    for (method, lr), score in zip(rates, scores, strict=True):
        tries[method][lr] = score
    best = {method: min(tried, key=tried.__getitem__) for method, tried in tries.items()}
    rate_of = best | {name: best[method.of] for name, method in world.OTHERS.items()}
    finals = [
        (method, lr, seed)
        for method, lr in rate_of.items()
        for seed in (world.OTHERS_SEEDS if method in world.OTHERS else SEEDS)
    ]
    runs = at_once(f"{name}, runs", partial(measure, name, folder), finals)
    references = at_once(f"{name}, teacher", partial(measure_references, name, folder), [(seed,) for seed in SEEDS])
    by_method: dict[str, list[Any]] = {method: [] for method in rate_of}
    for (method, _, _), run in zip(finals, runs, strict=True):
        by_method[method].append(run)
    seconds = sum(json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in folder.glob("*.json"))
    return report.Results(tries, best, by_method, references, seconds)


def at_once(what: str, work: Any, jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Return the results of all jobs; each core works on one at a time."""
    count = os.cpu_count() or 1
    with ProcessPoolExecutor(count, get_context("spawn"), initializer=_alone) as pool:
        return list(tqdm(pool.map(work, *zip(*jobs, strict=True)), what, len(jobs), unit="run"))


def _alone() -> None:
    """Initialize a process: use one thread, and discard its progress bars."""
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, until the process ends


def try_out(name: str, folder: Path, method: str, lr: float) -> float:
    """Return the score of a learning rate: the geometric mean of its distances."""
    world, tried = WORLDS[name], ALL[method]
    distances = done(
        folder / f"try-{method}-{lr:g}.json",
        lambda: world.try_out(tried, lr, TUNING_SEED, folder),
    )
    return math.exp(sum(math.log(max(each, 1e-4)) for each in distances) / len(distances))


def measure(name: str, folder: Path, method: str, lr: float, seed: int) -> Any:
    """Return the measured results of a run."""
    return done(folder / f"{method}-{lr:g}-{seed}.json", lambda: WORLDS[name].measure(ALL[method], lr, seed, folder))


def measure_references(name: str, folder: Path, seed: int) -> Any:
    """Return the measured results of the teacher's samplers and of fresh data."""
    return done(folder / f"references-{seed}.json", lambda: WORLDS[name].measure_references(seed, folder))


def done(path: Path, make: Any) -> Any:
    """Return the result in the file; if there is none, compute it with `make` and write it, with its seconds."""
    if not path.exists():
        started, result = time.monotonic(), make()
        unfinished = path.with_suffix(".unfinished")
        content = {"seconds": round(time.monotonic() - started), "result": result}
        unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
        unfinished.replace(path)
    return json.loads(path.read_text(encoding="utf-8"))["result"]
