"""Benchmark of quality: the methods that a LoRA can be distilled by, in a world of which everything is known.

python tests/bench/quality --results FOLDER [--write]

Each method gets the same number of iterations, and of tries to find its learning rate: one run at each of a few, from a
seed of its own; the one with the least distance, as a geometric mean over 1, 2, 4 and 8 steps at the gamma of the
method's own sampler, is then run from each of the seeds reported. A run that is in FOLDER already is not done again.
--write puts the tables and plots into docs/.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import checkerboard
import report
import torch
from methods import METHODS, SEEDS, TUNING_SEED, Method
from tqdm import tqdm

TUNED_AT = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="a file to each run")
    parser.add_argument("--write", action="store_true", help="write docs/quality.md and its plots")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    runs = len(METHODS) * (len(checkerboard.LEARNING_RATES) + len(SEEDS))
    with tqdm(total=runs, unit="run") as bar:
        found = {method.name: compare(method, options.results, bar) for method in METHODS}
    references = [
        done(options.results / f"references-{seed}.json", partial(checkerboard.measure_references, seed))
        for seed in SEEDS
    ]
    text = report.checkerboard(found, references)
    if options.write:
        report.write(text, found, references)
    else:
        print(text)


def compare(method: Method, folder: Path, bar: tqdm) -> dict[str, Any]:
    """The learning rates tried, each with its score, the one taken, and what came of it from each seed."""

    def run(lr: float, seed: int) -> dict[str, Any]:
        bar.set_postfix_str(f"{method.name}, lr {lr:g}, seed {seed}")
        path = folder / f"{method.name}-{lr:g}-{seed}.json"
        result = done(path, lambda: checkerboard.measure(checkerboard.distill(method, lr, seed), seed))
        bar.update()
        return result

    tries = {lr: score(method, run(lr, TUNING_SEED)) for lr in checkerboard.LEARNING_RATES}
    best = min(tries, key=tries.__getitem__)
    return {"tries": tries, "lr": best, "runs": [run(best, seed) for seed in SEEDS]}


def score(method: Method, result: dict[str, Any]) -> float:
    distances = [result["samples"][f"{steps} {method.gamma:g}"]["distance"] for steps in TUNED_AT]
    return math.exp(sum(math.log(max(each, 1e-4)) for each in distances) / len(distances))


def done(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` gives, as it is in the file, or is put there."""
    if not path.exists():
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(make(), indent=1), encoding="utf-8")
        unfinished.replace(path)
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
