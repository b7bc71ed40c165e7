"""A run is made longer: by the same command with a larger training.steps."""

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tiny_base import small_config
from trajectory_consistency.tcd.distill import optimizer
from trajectory_consistency.tcd.distill import training as distill_training
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.preflight import is_finished, output_conflict
from trajectory_consistency.trainer.run import run
from trajectory_consistency.trainer.training.loop import DivergedError
from trajectory_consistency.trainer.views.history import read_log

Values = dict[str, dict[str, object]]


def elsewhere(values: Values, folder: Path) -> Values:
    return {**values, "output": {"folder": str(folder)}}


def same(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_that_is_finished_can_be_made_longer(
    values: Values, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a constant learning rate, the longer run is the long one; so the schedule is all that differs."""
    caplog.set_level("INFO")
    monkeypatch.setattr(optimizer, "lr_factor", lambda step, steps, warmup_steps: 1.0)
    long = run(small_config(elsewhere(values, tmp_path / "long"), steps=3))
    short, longer = small_config(values, steps=2), small_config(values, steps=3)
    path, folder = run(short), short.output_folder
    assert [each.name for each in (folder / "checkpoints").iterdir()] == ["step-00000002.safetensors"]
    assert is_finished(short) and not is_finished(longer) and output_conflict(longer) == ""
    assert not same(path, long)
    caplog.clear()
    run(longer)
    assert "resuming at step 2 of 3" in caplog.text
    assert "training.steps was 2: from here on, learning rate and method.phases are those of a run of 3" in caplog.text
    assert same(path, long) and [row.step for row in read_log(folder)] == [1, 2, 3]
    run(longer)
    assert f"{path} is there, and the run is done; a larger training.steps makes it longer" in caplog.text
    with pytest.raises(UserError, match="has done 3 steps, and training.steps is 2: use at least 3, or choose another"):
        run(short)
    shutil.rmtree(folder / "checkpoints")
    assert run(longer) == path, "the checkpoint may be removed"
    with pytest.raises(UserError, match="tcd-lora.safetensors exists: choose another output.folder"):
        run(small_config(values, steps=4))


def test_a_longer_run_that_is_stopped_goes_on_with_the_lora_of_the_shorter_beside_it(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The learning rates of its steps are those of their place in the longer run."""
    caplog.set_level("INFO")
    short, longer = small_config(values, steps=2), small_config(values, steps=4, checkpoint_every=1)
    path = run(short)
    written, real = path.read_bytes(), distill_training.step_losses
    calls = 0

    def failing(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(distill_training, "step_losses", failing)
        with pytest.raises(Exception, match="out of memory"):
            run(longer)
    assert path.read_bytes() == written and not is_finished(longer)
    run(small_config(values, steps=4, accumulate=3))  # what may change does not make it another run
    assert path.read_bytes() != written and is_finished(longer)
    rates = [row.lr / 1e-3 for row in read_log(short.output_folder)]
    cosine = [0.5 * (1 + math.cos(math.pi * step / steps)) for step, steps in ((0, 2), (1, 2), (2, 4), (3, 4))]
    assert rates == pytest.approx(cosine)


def test_the_log_file_holds_what_is_said_with_times_and_why_a_run_ended(
    values: Values, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="trajectory-consistency")
    config = small_config(values, steps=2)
    file, real = config.output_folder / "log.txt", distill_training.step_losses
    with monkeypatch.context() as patch:
        patch.setattr(distill_training, "step_losses", lambda *arguments: real(*arguments) * float("nan"))
        with pytest.raises(DivergedError):
            run(config)
    first = file.read_text(encoding="utf-8")
    time = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "
    for line in (
        r"INFO base      .*, in torch.float32 on cpu",
        "WARNING step 1 is skipped: loss nan",
        "ERROR DivergedError: step 2: loss nan, .*no step was finite in 2 in a row",
    ):
        assert len(re.findall(time + line, first, re.MULTILINE)) == 1, line
    run(config)
    again = file.read_text(encoding="utf-8")
    assert again.startswith(first) and again.count(f"INFO wrote {config.lora_path}") == 1
    config.lora_path.unlink()
    with pytest.raises(UserError, match="other settings"):
        run(small_config(values, steps=2, seed=1))
    assert file.read_text(encoding="utf-8") == again, "a run that is refused does not write into another's"
