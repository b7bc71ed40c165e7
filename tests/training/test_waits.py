"""A step on a GPU waits for it once, when the loss is read: counted on the meta device in its place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiny_base import random_dataset, small_config, write_inputs
from trajectory_consistency.tcd.adapter import AVERAGE
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.run import load_student
from trajectory_consistency.trainer.training import loop
from trajectory_consistency.trainer.training.examples import read_examples

GPU = torch.device("meta")
aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Records each operation for which the CPU would wait until the GPU has done all that is queued."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        devices = {tensor.device.type for tensor in tensors_of(arguments, options)}
        if function is aten._to_copy.default and "device" in options:
            devices.add(torch.device(options["device"]).type)
        if len(devices) > 1 and not is_queued(function, arguments, options):
            self.found.append(str(function))
            if function is aten._to_copy.default and torch.device(options["device"]).type == "cpu":
                return torch.zeros_like(arguments[0], device="cpu")  # there are no data to read
        return function(*arguments, **options)


def tensors_of(*values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def is_queued(function: Any, arguments: Any, options: Any) -> bool:
    """Whether a copy between devices is only queued, or what comes from the CPU is one number."""
    if function is aten._to_copy.default:
        return bool(options.get("non_blocking"))
    if function is aten.copy_.default:
        return len(arguments) > 2 and bool(arguments[2])
    return all(tensor.ndim == 0 for tensor in tensors_of(arguments, options) if tensor.device.type == "cpu")


METHODS: dict[str, dict[str, object]] = {
    "tcd": {},
    "s+": {"target_time": True, "ema_decay": 0.5, "weighting": "x0"},
    "second order": {"order": 2, "weighting": "gap"},
    "lcm": {"law": "zero", "distance": "huber_sample"},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_step_waits_for_the_gpu_once(method: str, tmp_path: Path) -> None:
    config = small_config({**write_inputs(tmp_path), "method": METHODS[method]}, batch=4, accumulate=2)
    model = load_student(config, open_checkpoint(config.base), GPU, torch.float32)
    training = loop.Training(model, random_dataset(), config)
    first = [read_examples(config, random_dataset(), model.schedule, 0, rows) for rows in training.micro_batches]
    assert any(len(each.target_rows) for each in first), "the target is called too"
    with training, Waits() as waits:
        for _ in range(2):
            training.train_step()
    assert waits.found == ["aten._to_copy.default"] * 2, "the one that reads the loss"
    assert (AVERAGE in model.adapter.weights) == ("ema_decay" in METHODS[method])


def test_the_count_sees_what_waits() -> None:
    numbers, here = torch.ones(3, device=GPU), torch.ones(3)
    with Waits() as waits:
        for number, wait in enumerate((numbers.cpu, lambda: here.to(GPU), lambda: numbers.copy_(here))):
            wait()
            assert len(waits.found) == number + 1
        for queued in (lambda: here.to(GPU, non_blocking=True), lambda: numbers + 1, lambda: numbers[:2]):
            queued()
        assert len(waits.found) == 3
        # What reads a number of the device, or depends on one, is an error there: so it cannot be in a step either.
        for wait in (numbers.sum().item, lambda: bool((numbers == 0).any()), lambda: numbers[numbers > 0]):
            with pytest.raises((RuntimeError, NotImplementedError)):
                wait()
