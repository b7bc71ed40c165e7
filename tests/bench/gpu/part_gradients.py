"""The LoRA's gradient in the dtype of training beside float32, with the shipped settings, at the start and later."""

from __future__ import annotations

import torch
from bases import config_of, pictures, random_base, sd15_of, side_of
from gradients import errors_while_training
from measure import Bench

from trajectory_consistency.trainer.run import load_student
from trajectory_consistency.trainer.training.loop import Training

BATCH, LATER = 4, 20


def run(bench: Bench) -> None:
    """Compare the gradients of one batch after 0 and some steps, for two values of c in the distance."""
    side = side_of(bench, 512)
    for huber_c in (0.03, 0.001):
        with bench.case(f"sd15, huber_c {huber_c:g}") as has_time:
            if has_time:
                _compare(bench, side, huber_c)


def _compare(bench: Bench, side: int, huber_c: float) -> None:
    config = config_of(side, BATCH, method={"huber_c": huber_c}, device=str(bench.device))
    checkpoint = random_base(sd15_of(bench), bench.device)
    exact = load_student(config, checkpoint, bench.device, torch.float32)
    # The same weights, rounded: the random base makes others on each load.
    low = load_student(config, checkpoint, bench.device, torch.bfloat16)
    low.network.load_state_dict(exact.network.state_dict())
    training = Training(exact, pictures(checkpoint, side, BATCH), config)  # type: ignore[arg-type]
    for steps, errors in errors_while_training(training, {torch.bfloat16: low}, (1, 2 if bench.dry else LATER)):
        bench.keep(f"{sd15_of(bench)} {side} px, huber_c {huber_c:g}, after {steps} steps", errors[torch.bfloat16])
