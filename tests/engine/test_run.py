"""Whole runs of the trainer on ComfyUI's models: killed, resumed, and their file on the host's own MODEL."""

from __future__ import annotations

import signal
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, written
from lent_encoders import lend
from safetensors.torch import load_file
from small_models import each_family

from trajectory_consistency.trainer.config.settings import from_mapping
from trajectory_consistency.trainer.run import run
from trajectory_consistency.trainer.training import loop


def settings(name: str, folder: Path, out: Path) -> dict[str, Any]:
    """A short run with S+, shares, a moving average, recomputation and previews."""
    return {
        "base": FAMILIES[name].base(written(name, folder)),
        "data": {"folder": str(folder / "pictures"), "resolution": 64, "cache": str(out / "cache")},
        "method": {
            "weighting": "x0",
            "target_time": True,
            "diagonal": 0.5,
            "to_clean": 0.25,
            "ema_decay": 0.9,
            "guidance_min": 1.5,
            "guidance_max": 3.0,
        },
        "adapter": {"rank": 2, "alpha": 2.0},
        "training": {
            "steps": 4,
            "batch": 2,
            "lr": 1e-3,
            "checkpoint_every": 1,
            "device": "cpu",
        },
        "preview": {"prompts": ["a star"], "steps": [1, 2], "every": 2},
        "output": {"folder": str(out), "name": "lora"},
    }


def _stopped_run(name: str, values: dict[str, Any], number: signal.Signals) -> None:
    """Run, and send a signal to itself in the middle of the backward pass of the third step."""
    train_step = loop.Training.train_step

    def stopped(training: Any, *arguments: Any) -> Any:
        if training.step == 2:
            middle = training.parameters[len(training.parameters) // 2]
            middle.register_hook(lambda _: signal.raise_signal(number))
        return train_step(training, *arguments)

    loop.Training.train_step = stopped  # type: ignore[method-assign]
    with lend(FAMILIES[name]), suppress(KeyboardInterrupt):
        run(from_mapping(values))


def stopped_run(name: str, values: dict[str, Any], number: signal.Signals) -> int | None:
    """Return the exit code of such a run in a process of its own."""
    process = get_context("fork").Process(target=_stopped_run, args=(name, values, number))
    process.start()
    process.join()
    return process.exitcode


def same(one: Path, other: Path) -> bool:
    tensors, others = load_file(one), load_file(other)
    assert any(tensor.abs().max() > 0 for key, tensor in tensors.items() if key.endswith("lora_up.weight"))
    return tensors.keys() == others.keys() and all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())


@each_family
def test_a_run_that_was_killed_in_the_middle_of_a_step_ends_as_one_that_was_not(
    name: str, folder: Path, pictures: Path, tmp_path: Path
) -> None:
    killed = settings(name, folder, tmp_path / "killed")
    assert stopped_run(name, killed, signal.SIGKILL) == -signal.SIGKILL
    assert not list(tmp_path.rglob("*unfinished*")) and not (tmp_path / "killed" / "lora.safetensors").exists()
    assert [path.stem for path in (tmp_path / "killed" / "checkpoints").iterdir()] == ["step-00000001", "step-00000002"]
    with lend(FAMILIES[name]):
        resumed, whole = (run(from_mapping(each)) for each in (killed, settings(name, folder, tmp_path / "whole")))
    assert same(resumed, whole)
    assert len(list((tmp_path / "killed" / "previews").glob("*.jpg"))) == 3


def test_ctrl_c_in_the_middle_of_a_step_ends_after_it_and_can_be_resumed(
    folder: Path, pictures: Path, tmp_path: Path
) -> None:
    stopped = settings("sd3", folder, tmp_path / "stopped")
    stopped["training"]["checkpoint_every"] = 100
    assert stopped_run("sd3", stopped, signal.SIGINT) == 0
    assert [path.stem for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["step-00000003"]
    assert not list(tmp_path.rglob("*unfinished*"))
    with lend(FAMILIES["sd3"]):
        resumed, whole = (run(from_mapping(each)) for each in (stopped, settings("sd3", folder, tmp_path / "whole")))
    assert same(resumed, whole)
