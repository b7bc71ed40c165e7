"""Two processes that train together on the host's models are the one process with the whole batch."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, written
from lent_encoders import lend
from safetensors.torch import load_file, save_file
from small_models import each_family
from test_run import settings
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from trajectory_consistency.tcd.adapter import STUDENT
from trajectory_consistency.tcd.distill.order import Group
from trajectory_consistency.trainer.config.settings import Config, from_mapping
from trajectory_consistency.trainer.data.buckets import Size
from trajectory_consistency.trainer.data.dataset import Dataset, Table, caption_of
from trajectory_consistency.trainer.files.adapter_weights import initial_weights
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.models.comfy.conditioning import to_row
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.run import run
from trajectory_consistency.trainer.training.loop import Training
from trajectory_consistency.trainer.training.processes import ALONE, Processes
from trajectory_consistency.trainer.training.sharding import shard

PICTURES, STEPS = 4, 3


def config_of(name: str, folder: Path) -> Config:
    return from_mapping(
        {
            "base": FAMILIES[name].base(written(name, folder)),
            "data": {"folder": str(folder)},
            "method": {
                "target_time": True,
                "ema_decay": 0.9,
                "huber_c": 0.1,
                "skip": 100,
                "diagonal": 0.5,
                "to_clean": 0.0,
                "weighting": "none",
            },
            "adapter": {"rank": 2, "alpha": 2.0},
            "training": {"steps": STEPS, "batch": 4, "lr": 1e-3, "device": "cpu"},
            "output": {"folder": str(folder / "out")},
        }
    )


def dataset_of(family: Family, checkpoint: object) -> Dataset:
    """Return random latents and captions."""
    latents = {
        "mean": torch.randn(PICTURES, *family.latent, generator=torch.Generator().manual_seed(0)),
        "sizes": torch.tensor([64, 64, 0, 0, 64, 64]).expand(PICTURES, -1),
    }
    captions = Conditioning.cat([to_row(family.conditioning(seed)) for seed in range(PICTURES + 1)]).tensors
    table = Table(torch.tensor([(0, row, 0, row + 1) for row in range(PICTURES)]), [latents], [captions])
    return Dataset((Group(Size(64, 64), PICTURES, 1.0),), [table], caption_of(captions, 0), checkpoint.collate)


def trained(name: str, folder: Path, processes: Processes, *, fsdp: bool = False) -> dict[str, Tensor]:
    """Return the first gradient, as the optimizer keeps it, the LoRA, the losses, and this process's share."""
    config = config_of(name, folder)
    checkpoint = open_checkpoint(config.base)
    model = checkpoint.load(torch.float32, torch.device("cpu"))
    student = model.adapter.add(STUDENT, initial_weights(model, config))
    if fsdp:
        shard(model, processes)
    spread = [weight for weight in model.network.parameters() if isinstance(weight, DTensor)]
    share = sum(weight.to_local().numel() for weight in spread), sum(weight.numel() for weight in spread)
    found = {"share": torch.tensor(share)}
    with Training(model, dataset_of(FAMILIES[name], checkpoint), config, processes) as training:
        for step in range(STEPS):
            training.train_step()
            if step == 0:
                moments = training.optimizer.state
                found["gradient"] = torch.cat([moments[each]["exp_avg"].flatten() for each in training.parameters])
        found["losses"] = torch.tensor(training.losses)
    return found | {"weights": torch.cat([each.detach().flatten() for each in student.parameters()])}


def _process(rank: int, name: str, folder: Path, meeting: Path, fsdp: bool) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    found = trained(name, folder, Processes(rank, 2), fsdp=fsdp)
    save_file(found, meeting.with_suffix(f".{rank}"))
    distributed.destroy_process_group()


def in_two_processes(work: Callable[..., None], *arguments: Any) -> None:
    """Call `work` with the rank, 0 and 1, and the arguments in two processes at once, and wait for both."""
    context = get_context("fork")
    processes = [context.Process(target=work, args=(rank, *arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def trained_together(name: str, folder: Path, meeting: Path, *, fsdp: bool) -> list[dict[str, Tensor]]:
    """Return what each of two processes finds."""
    in_two_processes(_process, name, folder, meeting, fsdp)
    return [load_file(meeting.with_suffix(f".{rank}")) for rank in (0, 1)]


@pytest.mark.parametrize("fsdp", [False, True], ids=["each has the base", "FSDP"])
@each_family
def test_two_processes_are_one_with_the_whole_batch(name: str, fsdp: bool, folder: Path, tmp_path: Path) -> None:
    alone = trained(name, folder, ALONE)
    together = trained_together(name, folder, tmp_path / "meeting", fsdp=fsdp)
    for found in together:
        for part, tolerance in (("gradient", 1e-5), ("losses", 1e-5), ("weights", 1e-4)):
            assert (found[part] - alone[part]).norm() <= tolerance * alone[part].norm(), part
        kept, total = found["share"].tolist()
        assert (total > 1e6 and 0.45 < kept / total < 0.55) if fsdp else total == 0


def _run(rank: int, name: str, values: dict[str, Any], port: int, fsdp: bool) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if fsdp:
        os.environ["ACCELERATE_USE_FSDP"] = "true"  # as `accelerate launch` sets it
    with lend(FAMILIES[name]):
        run(from_mapping(values))


@pytest.mark.parametrize("fsdp", [False, True], ids=["each has the base", "FSDP"])
@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_a_whole_run_of_two_processes_writes_the_lora_of_one(
    name: str, fsdp: bool, folder: Path, pictures: Path, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    one, two = (settings(name, folder, tmp_path / each) for each in ("one", "two"))
    for values in (one, two):
        values["preview"] = {}  # FSDP draws none
        values["method"]["huber_c"] = 0.1
    with lend(FAMILIES[name]):
        expected = load_file(run(from_mapping(one)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    in_two_processes(_run, name, two, port, fsdp)
    found = load_file(tmp_path / "two" / "lora.safetensors")
    assert found.keys() == expected.keys()
    change, error = (
        sum(float((each.float() - start.get(key, each * 0).float()).square().sum()) for key, each in found.items())
        for start in ({}, expected)
    )
    assert error <= 1e-6 * change, "up to the rounding of float16"
