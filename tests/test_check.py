"""What `tcd-train check` says before a run: the data, the buckets, the LoRA's keys and the memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

from tiny_base import small_config, write_inputs
from trainer.cli import main
from trainer.encode import prepare
from trainer.errors import UserError
from trainer.lora_keys import describe_keys
from trainer.memory import Settings, estimate
from trainer.processes import Processes
from trainer.run import check, run

# A child that takes one step, and tells by how much its greatest memory grew from when the model was not there yet.
MEASURE = r"""
import pathlib, re, sys, torch
from trainer.config import load
from trainer.loop import train
from trainer.run import _student
from trainer.dataset import Dataset, Table, caption_of
from trainer.buckets import Size
from trainer.order import Group
config = load(pathlib.Path(sys.argv[1]))
height = config.data.resolution // 8
latents = {"mean": torch.randn(2, 4, height, height), "time_ids": torch.zeros(2, 6)}
captions = {"context": torch.randn(3, 77, int(sys.argv[2]))}
table = Table(torch.tensor([(0, row, 0, row + 1) for row in range(2)]), [latents], [captions])
dataset = Dataset((Group(Size(8 * height, 8 * height), 2, 1.0),), [table], caption_of(captions, 0))
def memory(name):
    # Not getrusage, whose greatest memory a process takes over from the one that started it.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(name + r":\s+(\d+) kB", status)[1]) * 1024
student, parameters, _ = _student(config, torch.device("cpu"), torch.float32)
frozen = sum(p.numel() * p.element_size() for p in student.unet.parameters())
before = memory("VmRSS")
train(student, parameters, dataset, config)
print(memory("VmHWM") - before + frozen)
"""


@pytest.fixture
def values(tmp_path: Path) -> dict[str, dict[str, object]]:
    return write_inputs(tmp_path)


def test_it_tells_all_and_writes_nothing(
    values: dict[str, dict[str, object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    assert main(["check", str(path), "training.batch=4"]) == 0
    said = capsys.readouterr().out
    assert "6 pictures" in said and re.search(r"64x64 +6 +6 +2 +2", said), said
    assert "lora_unet_" in said and re.search(r"memory +about \d+\.\d MiB", said)
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["check", str(path), "data.folder=/none"]) == 2


def test_the_keys_that_are_told_are_those_of_the_file(values: dict[str, dict[str, object]]) -> None:
    tensors = load_file(run(small_config(values, steps=1)))
    said = describe_keys("tiny", 4, ("all",))
    assert f"{len(tensors) // 3} modules of tiny's UNet, {len(tensors)} tensors" in said
    numbers = sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith("alpha"))
    assert f"{numbers / 1e6:.1f} million" in said
    assert set(re.findall(r"lora_unet_\S+", said)) <= tensors.keys()
    assert " modules of tiny's UNet" in describe_keys("tiny", 4, ("attention",)) and "conv1" not in describe_keys(
        "tiny", 4, ("attention",)
    )


def test_a_batch_that_cannot_be_divided_is_refused(values: dict[str, dict[str, object]]) -> None:
    with pytest.raises(UserError, match="training.batch is 8: use a multiple of .* 3 x 1"):
        check(small_config(values, batch=8, accumulate=3))
    with pytest.raises(UserError, match="training.batch is 9: use a multiple of .* 3 x 2"):
        check(small_config(values, batch=9, accumulate=3), Processes(0, 2))
    check(small_config(values, batch=9, accumulate=3))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no folder in which nobody may write")
def test_folders_where_nothing_can_be_written_are_refused(values: dict[str, dict[str, object]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="output.folder is /proc/out, but nothing can be written into /proc .*make it"):
        check(small_config({**values, "output": {"folder": "/proc/out"}}))
    values["data"]["cache"] = "/proc/cache"
    with pytest.raises(UserError, match="data.cache is /proc/cache, but nothing can be written into /proc"):
        check(small_config(values))


def test_a_complete_cache_need_not_be_writable(values: dict[str, dict[str, object]]) -> None:
    config = small_config(values)
    prepare(config, torch.device("cpu"), torch.float32)

    def refused(key: str, folder: Path) -> None:
        assert key == "output.folder", folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.run._check_writable", refused)
        check(config)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from /proc")
@pytest.mark.slow
def test_the_estimate_is_within_a_fifth_of_what_a_step_takes(
    values: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    values["data"]["resolution"] = 512  # large enough to be seen beside what the process has anyway
    config = small_config(values, steps=2, batch=2)
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), "32"],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    assert ended.returncode == 0, ended.stderr
    measured = int(ended.stdout.split()[-1])
    expected = estimate(Settings.of(config, "tiny", torch.float32)).total
    assert abs(expected / measured - 1) < 0.2, (expected, measured)


def test_what_takes_memory_is_seen_in_the_estimate(values: dict[str, dict[str, object]]) -> None:
    def total(**changed: object) -> int:
        return estimate(Settings.of(small_config(values, **changed), "tiny", torch.float32)).total

    plain = total(batch=4)
    assert total(batch=4, gradient_checkpointing=True) < plain and total(batch=4, accumulate=2) < plain
    assert total(batch=8) > plain and total(batch=8, accumulate=2) == pytest.approx(plain, rel=0.1)
    values["method"] = {"order": 2, "ema_decay": 0.9}
    assert total(batch=4) > 1.5 * plain
