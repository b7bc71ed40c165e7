"""A step on a GPU waits for it once, when the loss is read: counted on the meta device in its place."""

from pathlib import Path

import pytest
import torch

from tiny_base import random_dataset, small_config, write_inputs
from trajectory_consistency.tcd.adapter import AVERAGE
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.run import load_student
from trajectory_consistency.trainer.training import loop
from trajectory_consistency.trainer.training.examples import read_examples
from waits import GPU, counted_waits

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
    with training, counted_waits() as waits:
        for _ in range(2):
            training.train_step()
    assert waits == ["aten._to_copy.default"] * 2, "the one that reads the loss"
    assert (AVERAGE in model.adapter.weights) == ("ema_decay" in METHODS[method])


def test_the_count_sees_what_waits() -> None:
    numbers, here = torch.ones(3, device=GPU), torch.ones(3)
    waiting = (
        numbers.cpu,
        lambda: here.to(GPU),
        lambda: numbers.copy_(here),
        lambda: torch.tensor([1, 2], device=GPU),
        lambda: torch.as_tensor(3.0, device=GPU),
        lambda: numbers[[0, 2]],
    )
    with counted_waits() as waits:
        for number, wait in enumerate(waiting):
            wait()
            assert len(waits) == number + 1
        for queued in (lambda: here.to(GPU, non_blocking=True), lambda: numbers + 1, lambda: numbers[:2]):
            queued()
        assert len(waits) == len(waiting)
        # What reads a number of the device, or depends on one, is an error there: so it cannot be in a step either.
        for wait in (numbers.sum().item, lambda: bool((numbers == 0).any()), lambda: numbers[numbers > 0]):
            with pytest.raises((RuntimeError, NotImplementedError)):
                wait()
