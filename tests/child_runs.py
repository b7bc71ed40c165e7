"""Runs in processes of their own, to be killed: forked from one that has imported everything and done nothing."""

import json
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from trajectory_consistency.tcd.distill import training as distill_training
from trajectory_consistency.trainer import preflight, run
from trajectory_consistency.trainer.config.settings import from_mapping
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.files import write_lora
from trajectory_consistency.trainer.training import checkpoint, peers

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["trajectory_consistency.trainer.run", "child_runs"])


def start(
    values: dict[str, Any],
    death: str = "",
    *,
    place: tuple[int, int, int] | None = None,
    fsdp: bool = False,
    dead_seconds: float = peers.DEAD_SECONDS,
) -> BaseProcess:
    """Start a run that at `death`, a point of `POINTS`, dies by SIGKILL, or that is "asked to stop" in its first step.

    place: its rank, the number of processes and the port at which they meet, when it is one of several.
    dead_seconds: as peers.DEAD_SECONDS.
    """
    process = _CONTEXT.Process(target=_child, args=(values, death, place, fsdp, dead_seconds))
    process.start()
    return process


def finish(values: dict[str, Any], death: str = "") -> int:
    """Run to the end or to its death; return the exit code, -9 when it was killed."""
    process = start(values, death)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def finish_together(
    values: dict[str, Any],
    death: str = "",
    *,
    dying: int = 0,
    second: dict[str, Any] | None = None,
    **options: Any,
) -> list[int | None]:
    """Run in two processes, of which one dies at `death`; return their exit codes.

    second: the values of the second process, if it has others. options: as in `start`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        start(each, death if rank == dying else "", place=(rank, 2, port), **options)
        for rank, each in enumerate((values, second or values))
    ]
    processes[0].join()
    for process in processes[1:]:
        process.join(10)
        process.kill()  # a launcher does so when the first has ended
        process.join()
    return [process.exitcode for process in processes]


def losses_of(values: dict[str, Any]) -> list[float]:
    """The losses of the last run with these values that came to the end of its training."""
    found: list[float] = json.loads(_losses_path(values).read_text())
    return found


def shares_of(values: dict[str, Any]) -> list[tuple[int, int]]:
    """How many weights FSDP has spread, and how many of them each process of a run with these values has kept."""
    folder = Path(values["output"]["folder"])
    return [tuple(json.loads(path.read_text())) for path in folder.parent.glob(f"{folder.name}.*.share.json")]


def errors_of(values: dict[str, Any]) -> list[str]:
    """What stopped each process of the last run with these values, if it was a UserError."""
    folder = Path(values["output"]["folder"])
    return [path.read_text() for path in sorted(folder.parent.glob(f"{folder.name}.*.error"))]


def _losses_path(values: dict[str, Any]) -> Path:
    return Path(values["output"]["folder"]).with_suffix(".losses.json")


def _child(
    values: dict[str, Any], death: str, place: tuple[int, int, int] | None, fsdp: bool, dead_seconds: float
) -> None:
    torch.set_num_threads(1)
    peers.BEAT_SECONDS, peers.DEAD_SECONDS = dead_seconds / 24, dead_seconds
    if fsdp:
        os.environ["ACCELERATE_USE_FSDP"] = "true"  # as `accelerate launch` sets it
        _tell_share(values)
    if place is not None:
        rank, count, port = map(str, place)
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        if place[0] > 0:
            run.atomic_write = checkpoint.atomic_write = write_lora.atomic_write = _refused
            preflight.survey = preflight.open_checkpoint = _not_asked
            checkpoint.Checkpoints.steps = lambda self: [1]  # as a file system may tell that is late
    train = run.train

    def train_and_tell(*arguments: Any, **options: Any) -> list[float]:
        losses = train(*arguments, **options)
        if place is None or place[0] == 0:
            _losses_path(values).write_text(json.dumps(losses))
        return losses

    run.train = train_and_tell
    if death == "asked to stop":
        _asked_to_stop()
    elif death in POINTS:
        POINTS[death]()
    try:
        run.run(from_mapping(values))
    except UserError as error:
        Path(values["output"]["folder"]).with_suffix(f".{place and place[0]}.error").write_text(str(error))
        raise


def _tell_share(values: dict[str, Any]) -> None:
    shard = run.sharding.shard

    def shard_and_tell(model: Any, processes: Any) -> None:
        shard(model, processes)
        spread = [weight for weight in model.network.parameters() if isinstance(weight, DTensor)]
        share = [sum(w.numel() for w in spread), sum(w.to_local().numel() for w in spread)]
        Path(values["output"]["folder"]).with_suffix(f".{processes.rank}.share.json").write_text(json.dumps(share))

    run.sharding.shard = shard_and_tell


def _refused(path: Path) -> None:
    raise AssertionError(f"a process that is not the main one would write {path}")


def _not_asked(*_: object, **__: object) -> None:
    raise AssertionError("a process that is not the main one would look at the data or the base, as that one does")


def die(*_: object, **__: object) -> None:
    """End as by a power failure: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def _half_written(module: Any, save: str) -> None:
    whole = getattr(module, save)

    def half(tensors: dict[str, torch.Tensor], path: Path, *arguments: Any, **options: Any) -> None:
        whole(tensors, path, *arguments, **options)
        os.truncate(path, path.stat().st_size // 2)
        die()

    setattr(module, save, half)


def _at(method: str, name: str, *, after: bool) -> None:
    real: Callable[..., object] = getattr(Path, method)

    def watched(self: Path, *arguments: Any, **options: Any) -> object:
        if not self.match(name):
            return real(self, *arguments, **options)
        if after:
            real(self, *arguments, **options)
        return die()

    setattr(Path, method, watched)


def _asked_to_stop() -> None:
    step_losses = distill_training.step_losses

    def asked_meanwhile(*arguments: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return step_losses(*arguments)

    distill_training.step_losses = asked_meanwhile


POINTS: dict[str, Callable[[], None]] = {
    "in a step": lambda: setattr(distill_training, "step_losses", die),
    "half a configuration": lambda: _at("write_text", ".config*", after=True),
    "half a checkpoint": lambda: _half_written(checkpoint, "save_checked"),
    "a checkpoint without its name": lambda: _at("replace", ".step-*", after=False),
    "a checkpoint with its name": lambda: _at("replace", ".step-*", after=True),
    "a third checkpoint": lambda: _at("replace", ".step-00000003*", after=False),
    "an old checkpoint removed": lambda: _at("unlink", "step-*", after=True),
    "after the last step": lambda: setattr(run, "write_lora", die),
    "half a LoRA": lambda: _half_written(write_lora, "save_file"),
    "a LoRA without its name": lambda: _at("replace", ".tcd-lora*", after=False),
    "a LoRA with its name": lambda: _at("replace", ".tcd-lora*", after=True),
}
