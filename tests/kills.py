"""Kill runs in every phase, start them again, and compare with a run that was never killed: `python tests/kills.py`.

The run has shards, prompts without pictures, the target time (TCF(S+)), the average and previews. Each kill is a
SIGKILL before, during or after a call that is drawn by the seed. The exit status is 1 if a result differs.
"""

import argparse
import csv
import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from tiny_base import write_inputs
from trajectory_consistency.tcd.distill import training as distill_training
from trajectory_consistency.trainer import run
from trajectory_consistency.trainer.config.settings import from_mapping
from trajectory_consistency.trainer.data import encode, survey
from trajectory_consistency.trainer.data.cache import Index
from trajectory_consistency.trainer.data.store import Store
from trajectory_consistency.trainer.files import write_lora
from trajectory_consistency.trainer.training.checkpoint import Checkpoints
from trajectory_consistency.trainer.training.loop import Training
from trajectory_consistency.trainer.views.history import History
from trajectory_consistency.trainer.views.preview import Previews

PHASES: dict[str, tuple[Any, str]] = {
    "survey": (survey, "inspect_sample"),
    "encoding a picture": (encode._CacheFiller, "_encode_pictures"),
    "encoding captions": (encode._CacheFiller, "_encode_captions"),
    "drawing a picture": (encode, "dpm_solver_sample"),
    "writing rows": (Store, "_write"),
    "writing the index": (Index, "write"),
    "writing the configuration": (run, "_write_config"),
    "a preview": (Previews, "_draw"),
    "within a step": (distill_training, "step_losses"),
    "between steps": (Training, "train_step"),
    "the log": (History, "__call__"),
    "a checkpoint": (Checkpoints, "save"),
    "the report": (run, "write_report"),
    "the LoRA": (write_lora, "save_file"),
    "the whole of the last file": (run, "write_lora"),
    "deleting checkpoints": (Checkpoints, "prune"),
}
"""For each phase, in the order of a run, the function in whose calls it is killed."""
CONTEXT = get_context("forkserver")


class Death(NamedTuple):
    """When a run is killed."""

    phase: str
    call: int
    """The number of the phase's call, from 0."""
    share: float
    """Below 0: before the call; above 1: after it; otherwise that part of the usual time of a call later."""


class Calls(NamedTuple):
    """The calls of a phase in a run that was never killed."""

    count: int
    seconds: float
    """Mean length of one."""


def write_values(folder: Path) -> dict[str, Any]:
    """Write a base, a tar file of pictures and a file of prompts; return the values of a run that uses them."""
    values: dict[str, Any] = write_inputs(folder, pictures=4)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for path in sorted((folder / "data").iterdir()):
            tar.add(path, path.name)
    (folder / "prompts.txt").write_text("a red circle\na blue star\n", encoding="utf-8")
    sources = [{"path": str(folder / name)} for name in ("00000.tar", "prompts.txt")]
    data = {"sources": sources, "draw": {"steps": 3}, "caption_dropout": 0.2, "resolution": 64}
    return {
        **values,
        "data": {**data, "cache": str(folder / "cache")},
        "method": {"ema_decay": 0.5, "target_time": True},
        "training": {"steps": 6, "batch": 2, "lr": 1e-3, "checkpoint_every": 2, "device": "cpu"},
        "preview": {"prompts": ["a red circle"], "steps": [1], "every": 3},
        "output": {"folder": str(folder / "out")},
    }


def start(values: dict[str, Any], death: Death | None, seconds: float = 0.0, calls: Path | None = None) -> int:
    """Run to the end or to its death, and return the exit code; calls: where to write the `Calls` of each phase."""
    process = CONTEXT.Process(target=_child, args=(values, death, seconds, calls))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _child(values: dict[str, Any], death: Death | None, seconds: float, calls: Path | None) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars
    lengths: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for phase in PHASES:
        _watch(phase, death if death and death.phase == phase else None, seconds, lengths[phase])
    run.run(from_mapping(values))
    if calls is not None:
        calls.write_text(json.dumps({phase: (len(each), sum(each) / len(each)) for phase, each in lengths.items()}))


def _watch(phase: str, death: Death | None, seconds: float, lengths: list[float]) -> None:
    """Replace a phase's function by one that notes the lengths of its calls and dies in the one that `death` names."""
    owner, name = PHASES[phase]
    function = getattr(owner, name)

    def watched(*arguments: Any, **options: Any) -> Any:
        dies = death is not None and len(lengths) == death.call
        if dies and death.share < 0:
            _die()
        elif dies and death.share <= 1:
            threading.Timer(death.share * seconds, _die).start()
        began = time.perf_counter()
        result = function(*arguments, **options)
        lengths.append(time.perf_counter() - began)
        if dies and death.share > 1:
            _die()
        return result

    setattr(owner, name, watched)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def results(folder: Path) -> dict[str, Any]:
    """What a run has written, without the numbers that depend on the clock."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in (".jpg", ".png", ".toml", ".csv")
    }
    rows = csv.DictReader(io.StringIO(found.pop("log.csv").decode()))
    found["log.csv"] = [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]
    with safe_open(folder / "tcd-lora.safetensors", "pt") as file:
        found["metadata"] = {key: value for key, value in file.metadata().items() if key != "modelspec.date"}
        found["tensors"] = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118
    found["files"] = sorted(path.name for path in folder.rglob("*"))
    return found


def kill_runs(folder: Path, kills: int, rng: random.Random, say: Any = lambda text: None) -> Counter[str]:
    """Kill runs so often, in all phases alike, and compare each result; return the kills in each phase.

    A run is killed up to five times, in phases that follow each other. Raises AssertionError if a result differs.
    """
    values = write_values(folder)
    out, cache = folder / "out", folder / "cache"
    assert start(values, None, calls=folder / "calls.json") == 0
    calls = {phase: Calls(*each) for phase, each in json.loads((folder / "calls.json").read_text()).items()}
    assert min(each.count for each in calls.values()) > 0, f"a phase has no call: {calls}"
    expected, killed, order = results(out), Counter[str](), list(PHASES)
    while killed.total() < kills:
        shutil.rmtree(out)
        shutil.rmtree(cache)
        fewest = sorted(order, key=lambda phase: (killed[phase], rng.random()))[:5]
        history = []
        for phase in sorted(fewest, key=order.index)[: kills - killed.total()]:
            death = Death(phase, rng.randrange(calls[phase].count), rng.uniform(-0.5, 1.5))
            code = start(values, death, calls[phase].seconds)
            assert code in (0, -signal.SIGKILL), f"exit code {code} after {history}, at {death}"
            killed[phase] += code != 0
            history.append((death, code))
            if code == 0:  # a resumed run has fewer calls, or the timer was later than the end
                break
        code = 0 if history[-1][1] == 0 else start(values, None)
        found = results(out) if code == 0 else {}
        differs = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        assert not differs, f"exit code {code}, and {differs} differ after {history}"
        say(f"{killed.total()} kills; the same after {', '.join(f'{d.phase} {d.call}' for d, code in history if code)}")
    return killed


def main() -> int:
    """Run as many kills as asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    def say(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        try:
            killed = kill_runs(Path(folder), options.kills, random.Random(options.seed), say)
        except AssertionError as error:
            say(f"seed {options.seed}: {error}")
            return 1
    say("\n".join(f"{count:>3} in {phase}" for phase, count in killed.items()))
    return 0


if __name__ == "__main__":
    CONTEXT.set_forkserver_preload(["trajectory_consistency.trainer.run", "tiny_base"])
    sys.exit(main())
