"""The LoRA's gradient in the dtype of training beside float32, with the shipped settings, at the start and later."""

from __future__ import annotations

from copy import deepcopy

import torch
from bases import config_of, pictures, random_base, sd15_of, side_of
from measure import Bench, relative_and_cosine
from torch import Tensor

from trajectory_consistency.tcd.adapter import STUDENT
from trajectory_consistency.tcd.distill import step_losses
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
    low.adapter.add("average", deepcopy(exact.adapter.weights["average"]))
    for steps in (1, 2 if bench.dry else LATER):
        while training.step < steps:
            training.train_step()
        examples = training.read(training.step, 0).to(bench.device)
        gradients: list[list[Tensor]] = []
        for state in ("student", "average"):
            low.adapter.weights[state].load_state_dict(exact.adapter.weights[state].state_dict())
        for model in (low, exact):
            model.adapter.state = STUDENT
            parameters = list(model.adapter.weights[STUDENT].parameters())
            step_losses(model, examples, config.method).mean().backward()
            gradients.append([parameter.grad for parameter in parameters if parameter.grad is not None])
            for parameter in parameters:
                parameter.grad = None
        bench.keep(
            f"{sd15_of(bench)} {side} px, huber_c {huber_c:g}, after {steps} steps", relative_and_cosine(*gradients)
        )
