"""What `tcd-train check` says before a run: the data, the buckets, the LoRA's keys and the memory."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

from tiny_base import small_config, write_inputs
from trajectory_consistency.trainer import preflight
from trajectory_consistency.trainer.cli import main
from trajectory_consistency.trainer.config.base import BaseConfig
from trajectory_consistency.trainer.config.settings import AdapterConfig, DataConfig
from trajectory_consistency.trainer.data.buckets import Size
from trajectory_consistency.trainer.data.captions import long_captions
from trajectory_consistency.trainer.data.encode import load_or_encode
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.files.describe_keys import describe_keys
from trajectory_consistency.trainer.format_bytes import format_bytes
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.models.seam import Checkpoint
from trajectory_consistency.trainer.models.unet import families as bases
from trajectory_consistency.trainer.preflight import check, check_inputs
from trajectory_consistency.trainer.run import run
from trajectory_consistency.trainer.training.memory import (
    MemoryEstimate,
    MemorySettings,
    choose_accumulate,
    estimate_memory,
)
from trajectory_consistency.trainer.training.processes import Processes

# A child that takes one step, and prints by how much its peak memory grew since before the model was loaded.
MEASURE = r"""
import pathlib, re, sys, torch
from trajectory_consistency.trainer.config.settings import load
from trajectory_consistency.trainer.training.loop import train
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.run import load_student
from trajectory_consistency.trainer.data.dataset import Dataset, Table, caption_of
from trajectory_consistency.trainer.data.buckets import Size
from trajectory_consistency.tcd.distill.order import Group
from trajectory_consistency.trainer.data.captions import long_captions
torch.set_num_threads(1)
config = load(pathlib.Path(sys.argv[1]))
checkpoint = open_checkpoint(config.base)
height = config.data.resolution // 8
latents = {"mean": torch.randn(2, 4, height, height), "sizes": torch.zeros(2, 6)}
captions = {"context": torch.randn(3, 77, int(sys.argv[2]))}
table = Table(torch.tensor([(0, row, 0, row + 1) for row in range(2)]), [latents], [captions])
dataset = Dataset((Group(Size(8 * height, 8 * height), 2, 1.0),), [table], caption_of(captions, 0), checkpoint.collate)
def memory(name):
    # Not getrusage, whose greatest memory a process takes over from the one that started it.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(name + r":\s+(\d+) kB", status)[1]) * 1024
model = load_student(config, checkpoint, torch.device("cpu"), torch.float32)
frozen = sum(p.numel() * p.element_size() for p in model.network.parameters())
pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the greatest memory so far, that of loading
before = memory("VmRSS")
train(model, dataset, config)
print(memory("VmHWM") - before + frozen)
"""

# The same of the VAE of SD1.5 while it encodes a picture, and while it decodes one.
MEASURE_VAE = r"""
import pathlib, re, torch
from trajectory_consistency.trainer.models.unet import families as bases
from trajectory_consistency.trainer.models.unet.autoencoder import Vae
torch.set_num_threads(1)
def memory(name):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(name + r":\s+(\d+) kB", status)[1]) * 1024
vae = Vae(bases.empty_vae("sd15").requires_grad_(False).eval())
weights = sum(4 * parameter.numel() for parameter in vae.parameters())
for phase in (
    lambda: vae.encode(torch.zeros(1, 3, 512, 512, dtype=torch.uint8)),
    lambda: vae.decode(torch.zeros(1, 4, 64, 64)),
):
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    with torch.no_grad():
        phase()
    print(memory("VmHWM") - before + weights)
"""


@pytest.fixture
def values(tmp_path: Path) -> dict[str, dict[str, object]]:
    return write_inputs(tmp_path)


def opened(values: dict[str, dict[str, object]]) -> Checkpoint:
    return open_checkpoint(BaseConfig(**values["base"]))


def without_weights(family: bases.Family, folder: Path) -> Checkpoint:
    """A diffusers folder with no more in it than what identifies the family."""
    config = folder / "unet" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(bases.config(family, "unet")), encoding="utf-8")
    return open_checkpoint(BaseConfig(path=str(folder)))


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


def test_long_captions_are_counted_and_textual_inversions_refused(
    values: dict[str, dict[str, object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, texts = tmp_path / "config.toml", sorted(Path(str(values["data"]["folder"])).glob("*.txt"))
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    for text, count in zip(texts, (76, 75, 200), strict=False):
        text.write_text("word " * count, encoding="utf-8")
    assert main(["check", str(path)]) == 0
    assert re.search(r"\n +2 captions +longer than the text encoder takes", capsys.readouterr().out)
    config = small_config(values)
    assert long_captions(config.data, opened(values)) == 2
    texts[0].write_text("a fox, embedding:nice", encoding="utf-8")
    with pytest.raises(UserError, match="textual inversion, embedding:nice"):
        long_captions(config.data, opened(values))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n" + "word " * 76 + "\n", encoding="utf-8")
    assert long_captions(DataConfig(prompts=str(prompts)), opened(values)) == 1


def test_the_keys_that_are_listed_are_those_of_the_file(values: dict[str, dict[str, object]]) -> None:
    tensors = load_file(run(small_config(values, steps=1)))
    checkpoint = opened(values)
    said = describe_keys(checkpoint, AdapterConfig(rank=4))
    assert f"{len(tensors) // 3} modules of tiny's network, {len(tensors)} tensors" in said
    numbers = sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith("alpha"))
    assert f"{numbers / 1e6:.1f} million" in said
    assert set(re.findall(r"lora_unet_\S+", said)) <= tensors.keys()
    attention = describe_keys(checkpoint, AdapterConfig(rank=4, targets=("attention",)))
    assert " modules of tiny's network" in attention and "conv1" not in attention


def test_a_batch_that_cannot_be_divided_is_refused(values: dict[str, dict[str, object]]) -> None:
    with pytest.raises(UserError, match="training.batch is 8: use a multiple of .* 3 x 1"):
        check(small_config(values, batch=8, accumulate=3))
    with pytest.raises(UserError, match="training.batch is 9: use a multiple of .* 3 x 2"):
        check(small_config(values, batch=9, accumulate=3), Processes(0, 2))
    check(small_config(values, batch=9, accumulate=3))


def test_nothing_left_of_what_is_skipped_is_said_before_a_run_and_in_a_dry_one(
    values: dict[str, dict[str, object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for caption in (tmp_path / "data").glob("*.txt"):
        caption.unlink()
    values["data"]["skip_bad"] = True
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    for inspect in (check, check_inputs):
        with pytest.raises(UserError, match="no picture is left to train on: 6 of 6 pictures have no caption: 00000"):
            inspect(small_config(values))
    for command in (["check"], ["run", "--dry-run"], ["run"]):
        assert main([command[0], str(path), *command[1:]]) == 2
        assert capsys.readouterr().err.startswith("error: no picture is left to train on: 6 of 6 pictures have no")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["everything"], r"adapter.targets is \['everything'\]: use the groups all, .* or the kinds to_q, "),
        ([], r"is \[\]"),
    ],
)
def test_targets_that_the_model_does_not_have_are_refused_before_a_run(
    values: dict[str, dict[str, object]], targets: list[str], message: str
) -> None:
    values["adapter"]["targets"] = targets
    with pytest.raises(UserError, match=message):
        check(small_config(values))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no folder in which nobody may write")
def test_folders_where_nothing_can_be_written_are_refused(values: dict[str, dict[str, object]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="output.folder is /proc/out, but nothing can be written into /proc .*make it"):
        check(small_config({**values, "output": {"folder": "/proc/out"}}))
    values["data"]["cache"] = "/proc/cache"
    with pytest.raises(UserError, match="data.cache is /proc/cache, but nothing can be written into /proc"):
        check(small_config(values))


def test_a_complete_cache_need_not_be_writable(values: dict[str, dict[str, object]]) -> None:
    config = small_config(values)
    load_or_encode(config, torch.device("cpu"), torch.float32)

    def probe(dir: Path) -> Any:
        assert dir != config.cache_folder
        return TemporaryFile(dir=dir)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "TemporaryFile", probe)
        check(config)


def measured(program: str, *arguments: str) -> list[int]:
    """What a child prints, in which memory that is freed goes back to the system at once."""
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    assert ended.returncode == 0, ended.stderr
    return list(map(int, ended.stdout.split()))


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from /proc")


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(("family", "resolution", "batch", "rank"), [("tiny", 512, 2, 4), ("sd15", 128, 1, 64)])
def test_the_estimate_is_within_a_fifth_of_what_a_step_takes(
    values: dict[str, dict[str, object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: bases.Family,
    resolution: int,
    batch: int,
    rank: int,
) -> None:
    if family == "sd15":
        monkeypatch.syspath_prepend(Path(__file__).parents[1] / "host")
        values["base"]["path"] = str(importlib.import_module("full_size").full_size_sd15())
    values["data"]["resolution"] = resolution  # large enough to be seen beside what the process has anyway
    values["adapter"] = {"rank": rank}
    config = small_config(values, steps=2, batch=batch)
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    width = bases.config(family, "unet")["cross_attention_dim"]
    (taken,) = measured(MEASURE, str(path), str(width))
    expected = estimate_memory(open_checkpoint(config.base), MemorySettings.from_config(config, torch.float32)).training
    assert abs(expected / taken - 1) < 0.2, (expected, taken)


@LINUX
@pytest.mark.slow
def test_the_estimates_of_encoding_and_decoding_are_within_a_fifth_of_what_they_take(tmp_path: Path) -> None:
    settings, sd15 = MemorySettings(rank=4, batch=1, width=512, height=512), without_weights("sd15", tmp_path)
    unet_alone, both = estimate_memory(sd15, settings), estimate_memory(sd15, settings._replace(preview=Size(512, 512)))
    trained = unet_alone.adapter // 12  # its own four bytes, and two moments
    encoding, decoding = measured(MEASURE_VAE)
    with torch.device("meta"):
        text = 4 * sum(p.numel() for p in bases.empty_text_encoder("sd15").parameters())
    assert abs((both.caching - text) / encoding - 1) < 0.2, (both.caching - text, encoding)
    expected = both.preview - both.weights - both.adapter - 4 * trained
    assert abs(expected / decoding - 1) < 0.2, (expected, decoding)


def test_all_phases_are_listed_and_the_one_that_takes_most(values: dict[str, dict[str, object]]) -> None:
    def memory(**changed: dict[str, object]) -> MemoryEstimate:
        config = small_config({**values, **changed})
        return estimate_memory(opened(values), MemorySettings.from_config(config, torch.float32))

    plain = memory()
    assert plain.preview == 0 and plain.total == max(plain.training, plain.caching)
    assert str(plain).startswith(
        f"{format_bytes(plain.total)} at the most: {format_bytes(plain.training)} in training ("
    )
    assert f", no previews, {format_bytes(plain.caching)} while caching" in str(plain)
    large = memory(preview={"prompts": ["a"], "width": 512, "height": 1024})
    assert large.total == large.preview > large.training == plain.training
    assert f"{format_bytes(large.preview)} with a preview" in str(large)
    config = small_config(values)
    for dtype in (torch.float32, torch.bfloat16):  # the encoders are float32 whatever the network is
        encoding = estimate_memory(opened(values), MemorySettings.from_config(config, dtype)).caching
        assert encoding == plain.caching
    assert memory(data={**values["data"], "resolution": 256}).caching > 2 * plain.caching - plain.weights
    (Path(str(values["base"]["path"])).parent / "prompts.txt").write_text("a red circle\n", encoding="utf-8")
    drawn = memory(data={**values["data"], "folder": str(Path(str(values["base"]["path"])).parent / "prompts.txt")})
    assert drawn.caching >= drawn.weights


def test_on_a_gpu_the_estimate_of_caching_does_not_grow_without_bound(tmp_path: Path) -> None:
    gib, sd15 = 2**30, without_weights("sd15", tmp_path)
    for side, together in ((512, 8), (1024, 2), (1024, 1)):
        settings = MemorySettings(rank=4, batch=1, width=side, height=side, encode_batch=together)
        assert estimate_memory(sd15, settings).caching < 6 * gib
    assert estimate_memory(sd15, settings._replace(encode_batch=8)).caching > 20 * gib, (
        "what it was with eight pictures whatever the size"
    )


def test_as_few_parts_as_the_free_memory_allows(
    values: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    gpu, free = torch.device("cuda"), 0

    def parts(batch: int, device: torch.device = gpu, processes: int = 1) -> int:
        config = small_config(values, batch=batch, accumulate="auto", device="cpu")
        return choose_accumulate(config, opened(values), device, torch.float32, processes)

    def needed(batch: int, accumulate: int) -> int:
        config = small_config(values, batch=batch, accumulate=accumulate)
        return estimate_memory(opened(values), MemorySettings.from_config(config, torch.float32)).training

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    free = int(needed(6, 2) / 0.89)
    assert parts(6) == 2 and "training.accumulate is auto: 2, for which training takes about" in caplog.text
    assert parts(12, processes=2) == 2 and parts(3) == 1 and parts(9, processes=3) == 1
    assert parts(9) == 3, "not 4, which would leave a rest"
    free = int(needed(6, 2) / 0.91)
    assert parts(6) == 3
    free = 1000
    assert parts(6) == 6, "one picture at a time, if nothing is enough"
    assert parts(6, torch.device("cpu")) == 1
    assert choose_accumulate(small_config(values, batch=6, accumulate=3), opened(values), gpu, torch.float32) == 3


def test_what_takes_memory_is_seen_in_the_estimate(values: dict[str, dict[str, object]]) -> None:
    def total(**changed: object) -> int:
        return estimate_memory(
            opened(values), MemorySettings.from_config(small_config(values, **changed), torch.float32)
        ).training

    plain = total(batch=4)
    assert total(batch=4, gradient_checkpointing=True) < plain and total(batch=4, accumulate=2) < plain
    assert total(batch=8) > plain and total(batch=8, accumulate=2) == pytest.approx(plain, rel=0.1)
    values["method"] = {"order": 2, "ema_decay": 0.9}
    assert total(batch=4) > 1.5 * plain
