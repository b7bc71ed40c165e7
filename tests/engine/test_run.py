"""Whole runs of the trainer on ComfyUI's models: killed, resumed, and their file on the host's own MODEL."""

from __future__ import annotations

import signal
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


def _dying_run(name: str, values: dict[str, Any]) -> None:
    train_step = loop.Training.train_step

    def dying(training: Any, *arguments: Any) -> Any:
        if training.step == 2:
            signal.raise_signal(signal.SIGKILL)
        return train_step(training, *arguments)

    loop.Training.train_step = dying  # type: ignore[method-assign]
    with lend(FAMILIES[name]):
        run(from_mapping(values))


@each_family
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    name: str, folder: Path, pictures: Path, tmp_path: Path
) -> None:
    killed = settings(name, folder, tmp_path / "killed")
    process = get_context("fork").Process(target=_dying_run, args=(name, killed))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with lend(FAMILIES[name]):
        files = [run(from_mapping(values)) for values in (killed, settings(name, folder, tmp_path / "whole"))]
    resumed, whole = map(load_file, files)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[key]) for key, tensor in resumed.items())
    assert any(tensor.abs().max() > 0 for key, tensor in whole.items() if key.endswith("lora_up.weight"))
    assert len(list((tmp_path / "killed" / "previews").glob("*.jpg"))) == 3
