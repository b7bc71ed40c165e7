"""Several processes that train together are the one process with the whole batch."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tomli_w
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file

import child_runs
from tiny_base import model_of, random_dataset, small_config, with_adapter, write_inputs
from trajectory_consistency.trainer.config.settings import from_mapping
from trajectory_consistency.trainer.data.encode import fill_cache
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.preflight import check
from trajectory_consistency.trainer.training import loop
from trajectory_consistency.trainer.training.processes import Processes

LAUNCH = Path(__file__).parents[2] / "trainer" / "launch"
Values = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> Values:
    folder = tmp_path_factory.mktemp("inputs")
    values: Values = write_inputs(folder, pictures=5)
    values["method"] = {
        "ema_decay": 0.5,
        "diagonal": 0.75,
        "huber_c": 0.1,
    }  # a corner so small as the default's magnifies rounding
    values["training"] = {"steps": 4, "batch": 4, "checkpoint_every": 1, "keep_checkpoints": 4, "device": "cpu"}
    return values


def elsewhere(values: Values, folder: Path, **training: object) -> Values:
    return {**values, "training": {**values["training"], **training}, "output": {"folder": str(folder)}}


def saved(values: Values, step: int, part: str) -> torch.Tensor:
    """Everything under names that have `part` in them, after a step, in one row."""
    state = load_file(Path(values["output"]["folder"], "checkpoints", f"step-{step:08d}.safetensors"))
    return torch.cat([state[key].flatten() for key in sorted(state) if part in key])


@pytest.fixture(scope="module")
def alone(values: Values) -> Values:
    """A run by one process, with the checkpoint of its last step."""
    assert child_runs.finish(values, "after the last step") == -9
    return values


def assert_same(values: Values, alone: Values) -> None:
    """To 1e-5: the first gradient, as the optimizer keeps it, both adapters at the end, and every loss."""
    for step, part in ((1, ".exp_avg"), (4, "adapter."), (4, "losses")):
        expected, got = saved(alone, step, part), saved(values, step, part)
        assert ((got - expected).norm() / expected.norm()).item() <= 1e-5, part


def test_two_processes_with_half_of_the_batch_each_are_one_with_all_of_it(alone: Values, tmp_path: Path) -> None:
    values = elsewhere(alone, tmp_path / "out")
    assert child_runs.finish_together(values, death="after the last step")[0] == -9
    assert_same(values, alone)


def test_a_base_spread_over_two_processes_trains_the_same_lora(alone: Values, tmp_path: Path) -> None:
    values = elsewhere(alone, tmp_path / "out")
    assert child_runs.finish_together(values, "a LoRA without its name", fsdp=True)[0] == -9
    assert_same(values, alone)
    shares = child_runs.shares_of(values)
    assert len(shares) == 2 and all(total > 1e6 and 0.45 < kept / total < 0.55 for total, kept in shares)


def test_a_frozen_lora_is_not_spread_with_the_base(values: Values, tmp_path: Path) -> None:
    values = elsewhere(values, tmp_path / "out", steps=1)
    values |= {"method": {"target_time": True}, "adapter": {**values["adapter"], "freeze": True}}
    assert child_runs.finish_together(values, "after the last step", fsdp=True)[0] == -9
    first = saved(values, 1, ".down")
    assert len(first) > 10_000 and first.std() > 0.01 and saved(values, 1, "target_time").any()


def test_previews_are_refused_where_no_process_has_the_whole_base(
    values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = from_mapping({**values, "preview": {"prompts": ["a red square"]}})
    check(config)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP leaves none with the whole base: use preview.prompts="):
        check(config)


class Apart(Processes):
    """One of several processes, whose sum is never added up: its own share is kept, and it ends there."""

    shares: ClassVar[list[torch.Tensor]] = []

    def all_reduce(self, tensors: Sequence[torch.Tensor]) -> None:
        self.shares.append(torch.cat([tensor.flatten() for tensor in tensors]))
        raise InterruptedError


def test_with_the_default_corner_of_huber_shares_differ_from_the_whole_by_rounding_alone(
    values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, as the gradient turns within errors of 0.001, and so by the rounding of float32 over that."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    def share(rank: int, count: int, accumulate: int) -> torch.Tensor:
        net = model_of(Path(values["base"]["path"]))
        net.network.double()
        with_adapter(net, alpha=2.0).double()
        config = small_config({**values, "method": {}}, accumulate=accumulate)
        assert config.method.huber_c == 0.001
        training = loop.Training(net, random_dataset(), config, Apart(rank, count))
        with pytest.raises(InterruptedError):
            training.train_step()
        return Apart.shares.pop()

    whole = share(0, 1, 1)
    assert whole.dtype == torch.float64
    shared = share(0, 2, 2) + share(1, 2, 2)
    assert ((shared - whole).norm() / whole.norm()).item() < 1e-12


def test_what_stops_a_run_at_its_start_stops_all_of_its_processes(values: Values, tmp_path: Path) -> None:
    assert child_runs.finish_together(elsewhere(values, tmp_path / "out", batch=4, accumulate=3)) == [1, 1]
    assert not (tmp_path / "out").exists()


def test_processes_that_do_not_find_the_same_data_end_with_an_error(values: Values, tmp_path: Path) -> None:
    """The first has a complete cache, and the second none or one of other data."""
    values = elsewhere(values, tmp_path / "out", steps=1)
    fill_cache(from_mapping(values), torch.device("cpu"), torch.float32)
    shutil.copytree(values["data"]["folder"], tmp_path / "data")
    (tmp_path / "data" / "00001.txt").write_text("another caption", encoding="utf-8")
    other = {**values, "data": {**values["data"], "folder": str(tmp_path / "data"), "cache": str(tmp_path / "cache")}}
    for message in ("does not have all data", "has other data for this process than for the main one"):
        assert child_runs.finish_together(values, second=other) == [1, 1]
        first, second = child_runs.errors_of(values)
        assert first == second and f"{tmp_path / 'cache'} {message}" in first
        fill_cache(from_mapping(other), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("dying", [0, 1])
def test_when_a_process_dies_the_other_ends_with_an_error(values: Values, tmp_path: Path, dying: int) -> None:
    values = elsewhere(values, tmp_path / "out")
    codes = child_runs.finish_together(values, "in a step", dying=dying, dead_seconds=2.0)
    assert codes == [1 - 10 * (rank == dying) for rank in (0, 1)]


def test_parts_one_after_another_are_the_batch_at_once(alone: Values, tmp_path: Path) -> None:
    values = elsewhere(alone, tmp_path / "out", accumulate=4)
    assert child_runs.finish(values, "after the last step") == -9
    assert_same(values, alone)


def test_one_goes_on_where_two_were_and_two_where_one_was(alone: Values, tmp_path: Path) -> None:
    values = elsewhere(alone, tmp_path / "out")
    assert child_runs.finish_together(values, death="a third checkpoint")[0] == -9
    assert child_runs.finish(values, "after the last step") == -9
    assert_same(values, alone)
    other = elsewhere(alone, tmp_path / "other", accumulate=2)
    assert child_runs.finish(other, "a third checkpoint") == -9
    assert child_runs.finish_together(other, death="after the last step")[0] == -9
    assert_same(other, alone)


def test_when_one_is_asked_to_stop_all_stop_at_the_same_step_and_it_is_saved(values: Values, tmp_path: Path) -> None:
    values = elsewhere(values, tmp_path / "out", checkpoint_every=100)
    assert child_runs.finish_together(values, "asked to stop", dying=1) == [1, 1]
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000001.safetensors"]


def test_every_row_of_a_step_is_one_processs_in_one_part() -> None:
    for count, accumulate in ((1, 1), (1, 3), (2, 1), (4, 3)):
        parts = [part for rank in range(count) for part in Processes(rank, count).micro_batches(24, accumulate)]
        assert [row for part in parts for row in range(24)[part]] == list(range(24))
        assert len(parts) == count * accumulate and len({part.stop - part.start for part in parts}) == 1
    with pytest.raises(UserError, match="training.batch is 8: use a multiple of .* 3 x 2"):
        Processes(0, 2).micro_batches(8, 3)


@pytest.mark.parametrize("name", ["cpu", "gpus", "fsdp"])
def test_accelerate_understands_what_is_shipped(name: str) -> None:
    settings = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert settings.num_processes == 2 and settings.mixed_precision == "no"
    assert settings.distributed_type == (DistributedType.FSDP if name == "fsdp" else DistributedType.MULTI_GPU)


def test_accelerate_launches_two_processes_of_which_one_writes_and_speaks(values: Values, tmp_path: Path) -> None:
    values = elsewhere(values, tmp_path / "out", steps=1)
    overrides = [f"{section}.{key}={value}" for section in values for key, value in values[section].items()]
    (tmp_path / "config.toml").touch()
    launch = ["accelerate.commands.launch", "--config_file", str(LAUNCH / "cpu.yaml"), "--main_process_port", "0"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            *launch,
            "-m",
            "trajectory_consistency.trainer",
            "run",
            str(tmp_path / "config.toml"),
            *overrides,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "tcd-lora.safetensors").exists()
    assert (tmp_path / "out" / "log.txt").read_text().count("wrote ") == 1, "by the first process alone"
    assert done.stderr.count("wrote ") == 1 and done.stderr.count("1 steps of 4 pictures") == 1
    assert done.stderr.count("distilling: 100%") in (1, 2)  # a bar is drawn once more when it is closed


SPREAD = """
import sys
from torch.distributed.tensor import DTensor
from trajectory_consistency.trainer.training import sharding
from trajectory_consistency.trainer.cli import main
shard = sharding.shard
def shard_and_tell(model, *arguments):
    shard(model, *arguments)
    print("spread:", sum(isinstance(weight, DTensor) for weight in model.network.parameters()) > 100, flush=True)
sharding.shard = shard_and_tell
sys.exit(main())
"""


@pytest.mark.slow
def test_accelerate_launches_fsdp_on_a_cpu_too(values: Values, tmp_path: Path) -> None:
    values = elsewhere(values, tmp_path / "out", steps=1)
    (tmp_path / "config.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
    (tmp_path / "spread.py").write_text(SPREAD, encoding="utf-8")
    launch = ["accelerate.commands.launch", "--config_file", str(LAUNCH / "fsdp.yaml")]
    done = subprocess.run(
        [sys.executable, "-m", *launch, "--main_process_port", "0", "spread.py", "run", "config.toml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("spread: True") == 2 and done.stderr.count("wrote ") == 1
    assert (tmp_path / "out" / "tcd-lora.safetensors").exists()
