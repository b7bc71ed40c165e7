"""A training step of SD1.5 and SDXL: images a second, memory beside the estimate, and utilisation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from bases import config_of, pictures, random_base, side_of
from measure import Bench, count_flops

from trajectory_consistency.trainer.run import load_student
from trajectory_consistency.trainer.training.loop import Training
from trajectory_consistency.trainer.training.memory import MemorySettings, estimate_training

COUNTED, TIMED = 4, 8
RECOMPUTED, COMPILED = {"gradient_checkpointing": True}, {"compile": True}


class Case(NamedTuple):
    """A batch size, settings of [training], and a layout of memory that is no setting: is it worth to be one?"""

    batch: int
    training: dict[str, Any] = {}
    is_channels_last: bool = False

    def __str__(self) -> str:
        return ", ".join([f"batch {self.batch}", *self.training, *["channels last"] * self.is_channels_last])


FAMILIES = {
    "sd15": (
        512,
        [
            *(Case(1), Case(16), Case(4), Case(32), Case(1, RECOMPUTED), Case(16, RECOMPUTED)),
            *(Case(16, {}, is_channels_last=True), Case(16, COMPILED)),
        ],
    ),
    "sdxl": (1024, [Case(1, RECOMPUTED), Case(4, RECOMPUTED), Case(1), Case(2), Case(4)]),
}


def run(bench: Bench) -> None:
    """Measure every case of every family."""
    dry = {"tiny": (64, [Case(1), Case(2, RECOMPUTED), Case(2, {}, is_channels_last=True)])}
    for family, (side, cases) in (dry if bench.dry else FAMILIES).items():
        flops = _flops_of_an_image(bench, family, side)
        for case in cases:
            with bench.case(f"{family} {side} px {case}") as has_time:
                if has_time:
                    _measure(bench, family, side, case, flops)


def _measure(bench: Bench, family: Any, side: int, case: Case, flops: float) -> None:
    training = _training(bench, family, side, case)
    timed = bench.time(training.train_step, 2 if bench.dry else TIMED, warm_up=3 if "compile" in case.training else 2)
    estimate = estimate_training(
        random_base(family, bench.device),
        MemorySettings.from_config(config_of(side, case.batch, device=str(bench.device), **case.training), bench.dtype),
    )
    figures = {**bench.figures(timed, case.batch, flops), "estimated GB": round(estimate.total / 1e9, 3)}
    bench.keep(f"{family} {side} px {case}", figures)


def _flops_of_an_image(bench: Bench, family: Any, side: int) -> float:
    """Return the FLOPs of all passes of a step, for each picture, without recomputation."""
    training = _training(bench, family, side, Case(2))
    training.train_step()
    flops = count_flops(training.train_step, COUNTED) / 2
    bench.keep(f"{family} {side} px, TFLOP an image", round(flops / 1e12, 3))
    return flops


def _training(bench: Bench, family: Any, side: int, case: Case) -> Training:
    config = config_of(side_of(bench, side), case.batch, device=str(bench.device), **case.training)
    checkpoint = random_base(family, bench.device)
    student = load_student(config, checkpoint, bench.device, bench.dtype)
    if case.is_channels_last:
        student.network.to(memory_format=torch.channels_last)
    return Training(student, pictures(checkpoint, side_of(bench, side), case.batch), config)  # type: ignore[arg-type]
