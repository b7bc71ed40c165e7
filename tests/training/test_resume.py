"""A run that was killed, stopped or failed, and started again, is the run that never was."""

import itertools
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import child_runs
from tiny_base import write_base, write_inputs
from trajectory_consistency.tcd.distill import training as distill_training
from trajectory_consistency.trainer import preflight
from trajectory_consistency.trainer.cli import main
from trajectory_consistency.trainer.config.settings import from_mapping
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.files.metadata import config_digest
from trajectory_consistency.trainer.lock import locked
from trajectory_consistency.trainer.preflight import check
from trajectory_consistency.trainer.run import run
from trajectory_consistency.trainer.training.checkpoint import Checkpoints
from trajectory_consistency.trainer.training.processes import Processes
from trajectory_consistency.trainer.views.history import read_log

Values = dict[str, dict[str, Any]]
KILLS = 20
FINISHED = ["checkpoints", "config.toml", "log.csv", "log.txt", "loss_by_time.csv", "report.html"]
FINISHED += ["tcd-lora.safetensors"]


def lora(values: Values) -> dict[str, torch.Tensor]:
    return load_file(Path(values["output"]["folder"]) / "tcd-lora.safetensors")


def elsewhere(values: Values, folder: Path, **training: object) -> Values:
    return {**values, "training": {**values["training"], **training}, "output": {"folder": str(folder)}}


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> Values:
    folder = tmp_path_factory.mktemp("inputs")
    values: Values = write_inputs(folder, pictures=3)
    values["method"] = {"ema_decay": 0.5}
    values["training"] = {"steps": 6, "batch": 2, "lr": 1e-3, "checkpoint_every": 1, "device": "cpu"}
    return values


@pytest.fixture(scope="module")
def whole(values: Values) -> Values:
    """A run that was never killed."""
    assert child_runs.finish(values) == 0
    return values


def assert_same(values: Values, whole: Values) -> None:
    assert sorted(path.name for path in Path(values["output"]["folder"]).iterdir()) == FINISHED
    expected, got = lora(whole), lora(values)
    assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)


def test_a_run_killed_while_it_writes_and_started_again_is_the_run_never_killed(whole: Values, tmp_path: Path) -> None:
    values = elsewhere(whole, tmp_path / "out")
    for point in child_runs.POINTS:
        assert child_runs.finish(values, point) == -9, point
    assert child_runs.finish(values) == 0
    assert_same(values, whole)
    assert child_runs.losses_of(values) == child_runs.losses_of(whole)


def test_a_run_killed_at_any_moment_and_started_again_is_the_run_never_killed(values: Values, tmp_path: Path) -> None:
    """At random moments since the process began: while it caches, draws previews, trains and writes."""
    seed = int(os.environ.get("KILL_SEED", random.randrange(2**32)))
    moments, deaths = random.Random(seed), 0
    preview = {"prompts": ["a red circle"], "steps": [1], "every": 2}
    values = {**values, "preview": preview, "data": {**values["data"], "cache": str(tmp_path / "cache")}}
    never = elsewhere(values, tmp_path / "whole", steps=4)
    killed = elsewhere(values, tmp_path / "killed", steps=4)
    began = time.monotonic()
    assert child_runs.finish(never) == 0
    length = time.monotonic() - began

    def assert_never_killed() -> None:
        names = sorted(path.name for path in (tmp_path / "killed").iterdir() if not path.name.startswith("."))
        assert names == sorted([*FINISHED, "previews"]), context
        expected, got = lora(never), lora(killed)
        assert all(torch.equal(expected[key], got[key]) for key in expected), context
        assert [row.step for row in read_log(tmp_path / "killed")] == [1, 2, 3, 4], context

    shutil.rmtree(tmp_path / "cache")
    while deaths < KILLS:
        process = child_runs.start(killed)
        process.join(moments.uniform(0, length))
        process.kill()
        process.join()
        context = f"KILL_SEED={seed}, after {deaths} kills"
        assert process.exitcode in (0, -signal.SIGKILL), context
        deaths += process.exitcode != 0
        if process.exitcode == 0:  # it was faster than its death: the next begins with nothing
            assert_never_killed()
            shutil.rmtree(tmp_path / "killed")
            shutil.rmtree(tmp_path / "cache")
    assert child_runs.finish(killed) == 0, context
    assert_never_killed()


def test_whatever_stops_a_run_it_says_what_to_do_and_the_same_command_goes_on(
    whole: Values,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO")
    values = elsewhere(whole, tmp_path / "out")
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    log_file = tmp_path / "out" / "log.csv"
    real, limits = distill_training.step_losses, resource.getrlimit(resource.RLIMIT_FSIZE)

    def stopped_by(trouble: Callable[[Tensor], object], after: int, times: int = 1) -> tuple[int, str]:
        """Run until `trouble` comes in the step after so many of this start, and in as many as `times` says."""
        calls = itertools.count()

        def losses(*arguments: Any) -> object:
            loss = real(*arguments)
            return trouble(loss) if after <= next(calls) < after + times else loss

        monkeypatch.setattr(distill_training, "step_losses", losses)
        code = main(["run", str(path)])
        return code, capsys.readouterr().err

    def control_c(loss: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return loss

    def no_memory(_: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    def full_disk(loss: Tensor) -> Tensor:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        return loss

    def full_log(loss: Tensor) -> Tensor:
        log_file.unlink()
        log_file.symlink_to("/dev/full")
        return loss

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the whole run, since the order of sums depends on it
    try:
        code, said = stopped_by(control_c, 0)
        assert code == 130 and "stopped after step 1 of 6: saved; the same command resumes there" in said
        shutil.copytree(tmp_path / "out", tmp_path / "before")
        code, said = stopped_by(lambda loss: loss * float("nan"), 0, 5)
        assert code == 1 and "error: step 6: loss nan" in said and "try a smaller training.lr" in said
        shutil.rmtree(tmp_path / "out")  # its steps that were skipped count
        shutil.move(tmp_path / "before", tmp_path / "out")
        code, said = stopped_by(no_memory, 2)
        assert code == 1 and "training.gradient_checkpointing=true, or a larger training.accumulate" in said
        code, said = stopped_by(full_log, 1)
        log_file.unlink()
        assert code == 1 and f"{log_file} could not be written" in said and "make room on the disk" in said
        code, said = stopped_by(full_disk, 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (
            code == 1 and "step-00000005.safetensors could not be written" in said and "takes no file so large" in said
        )
        kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
        assert kept == ["step-00000003.safetensors", "step-00000004.safetensors"]
        code, said = stopped_by(lambda loss: loss, -1)
        assert code == 0 and "resuming at step 4 of 6" in caplog.text
    finally:
        torch.set_num_threads(threads)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_same(values, whole)


@pytest.fixture
def half_way(whole: Values, tmp_path: Path) -> Values:
    """A run that has two checkpoints and is not finished."""
    values = elsewhere(whole, tmp_path / "out")
    assert child_runs.finish(values, "a third checkpoint") == -9
    return values


def test_a_run_goes_on_in_another_way_but_not_to_another_result(half_way: Values) -> None:
    config = from_mapping(half_way)
    check(from_mapping(elsewhere(half_way, config.output_folder, checkpoint_every=3, gradient_checkpointing=True)))
    check(from_mapping(elsewhere(half_way, config.output_folder, steps=20)))
    with pytest.raises(UserError, match="has done 2 steps, and training.steps is 1: use at least 2, or choose another"):
        check(from_mapping(elsewhere(half_way, config.output_folder, steps=1)))
    for changed in ({"batch": 3}, {"lr": 1e-4, "seed": 3}):
        with pytest.raises(UserError) as caught:
            check(from_mapping(elsewhere(half_way, config.output_folder, **changed)))
        assert all(f"training.{key} was {half_way['training'].get(key, 0)}" in str(caught.value) for key in changed)
        assert "choose another output.folder" in str(caught.value)


def test_a_run_does_not_go_on_with_other_pictures_captions_or_weights(half_way: Values, whole: Values) -> None:
    config = from_mapping(half_way)
    data, base = Path(config.data.folder), Path(config.base.path)
    before = {path: path.read_bytes() for path in (*data.iterdir(), base)}
    picture = data / "00001.png"

    def refused(message: str) -> None:
        with pytest.raises(
            UserError, match=rf"has step 2 of .*, {message}.*: restore what has changed, or choose another"
        ):
            run(config)

    try:
        picture.rename(data / "gone")
        refused(r"the data was 3 captioned pictures, \w+ and is 2 captioned pictures")
        (data / "gone").rename(picture)
        shutil.copy(picture, data / "more.png")
        (data / "more.txt").write_text("one more", encoding="utf-8")
        refused(r"the data was 3 captioned pictures, \w+ and is 4 captioned pictures")
        (data / "more.png").unlink()
        picture.with_suffix(".txt").write_text("something else", encoding="utf-8")
        refused(r"the data was 3 captioned pictures, \w+ and is 3 captioned pictures")
        write_base(base, seed=1)
        refused("the base was")
        with pytest.raises(UserError, match="the base was"):
            check(config)
    finally:
        (data / "more.txt").unlink(missing_ok=True)
        for path, content in before.items():
            path.write_bytes(content)
    assert child_runs.finish(half_way) == 0, "they are the same again, though touched"
    assert_same(half_way, whole)


def test_a_run_killed_when_the_lora_had_its_name_is_finished_by_the_same_command(
    whole: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    values, path = elsewhere(whole, tmp_path / "out"), tmp_path / "config.toml"
    assert child_runs.finish(values, "a LoRA with its name") == -9
    assert (tmp_path / "out" / "checkpoints").is_dir()
    (tmp_path / "out" / "report.html").unlink()
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    for _ in range(2):
        assert main(["run", str(path)]) == 0
        assert "tcd-lora.safetensors is there, and the run is done" in caplog.text
        assert_same(values, whole)
    assert main(["run", str(path), "training.lr=1e-4"]) == 2
    assert "tcd-lora.safetensors exists: choose another output.folder" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["of another run", "before the last step", "no LoRA"])
def test_a_file_of_the_loras_name_that_this_run_has_not_written_is_refused(
    half_way: Values, whole: Values, how: str
) -> None:
    config = from_mapping(half_way)
    if how != "before the last step":
        shutil.rmtree(config.output_folder / "checkpoints")
    tensors = lora(whole)
    save_file(tensors, config.lora_path, metadata={"tcd.config_sha256": config_digest(config)})
    if how == "of another run":
        save_file(tensors, config.lora_path, metadata={"tcd.config_sha256": config_digest(from_mapping(whole))})
    elif how == "no LoRA":
        config.lora_path.write_bytes(b"precious")
    content = config.lora_path.read_bytes()
    with pytest.raises(UserError, match="tcd-lora.safetensors exists: choose another output.folder"):
        run(config)
    assert config.lora_path.read_bytes() == content


@pytest.mark.parametrize("damage", ["cut", "a bit"])
def test_a_damaged_checkpoint_is_passed_over(
    half_way: Values, whole: Values, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    folder = Path(half_way["output"]["folder"], "checkpoints")
    newest = Checkpoints(folder, 1, 2).steps()[0]
    path = folder / f"step-{newest:08d}.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content[:1000] if damage == "cut" else content)
    tensors = Checkpoints(folder, 1, 2).load_latest()
    assert tensors is not None and len(tensors["losses"]) == newest - 1
    assert f"step-{newest:08d}.safetensors is damaged and is skipped" in caplog.text
    assert child_runs.finish(half_way) == 0
    assert_same(half_way, whole)


def test_a_checkpoint_that_was_read_is_not_mapped(half_way: Values) -> None:
    """Windows removes and replaces no file that is."""
    checkpoints = Checkpoints(Path(half_way["output"]["folder"], "checkpoints"), 1, 2)
    tensors = checkpoints.load_latest()
    assert tensors and "step-0000" not in Path("/proc/self/maps").read_text()


class Told(Processes):
    """A process to which the main one says that the newest checkpoint is of step 1, or of one that it does not see."""

    def on_main_process(self, function: Callable[[], Any]) -> Any:
        return self.rank

    def on_every_process(self, function: Callable[[], Any]) -> Any:
        return function()


def test_the_main_process_decides_which_checkpoint_is_resumed(half_way: Values) -> None:
    checkpoints = Checkpoints(Path(half_way["output"]["folder"], "checkpoints"), 1, 2)
    assert [len((checkpoints.load_latest(Told(step, 4)) or {})["losses"]) for step in (1, 2)] == [1, 2]
    with pytest.raises(UserError, match=r"step-00000003.safetensors cannot be read.*must reach output.folder"):
        checkpoints.load_latest(Told(3, 4))


def test_a_run_does_not_begin_in_a_folder_in_use(whole: Values, tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(UserError, match=f"in use by process {os.getpid()} on .*: wait until"):
        run(from_mapping(elsewhere(whole, tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_checkpoints_without_their_configuration_are_not_taken_up(half_way: Values) -> None:
    Path(half_way["output"]["folder"], "config.toml").unlink()
    with pytest.raises(UserError, match="has checkpoints but no config.toml"):
        check(from_mapping(half_way))


def test_a_run_does_not_resume_on_a_base_of_a_different_dtype(
    half_way: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when base.dtype is "auto", and the device that it depends on is another kind of device."""
    config = from_mapping(half_way)
    assert config.base.dtype == "auto"
    check(config)
    monkeypatch.setattr(preflight, "device_and_dtype", lambda config: (torch.device("cpu"), torch.bfloat16))
    with pytest.raises(UserError, match=r"the base's dtype was torch.float32 and is torch.bfloat16"):
        check(config)
