"""The LoRA's gradient in other dtypes of the base, beside that of a training in float32, while it goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from trajectory_consistency.tcd.adapter import AVERAGE, STUDENT
from trajectory_consistency.tcd.distill import Examples, step_losses
from trajectory_consistency.trainer.models.seam import Model
from trajectory_consistency.trainer.training.loop import Training


def errors_while_training(
    training: Training, others: Mapping[torch.dtype, Model], at: Sequence[int]
) -> Iterator[tuple[int, dict[torch.dtype, dict[str, float]]]]:
    """Yield, after each number of steps, how far the next batch's gradient is from that in float32, by dtype.

    training: of a float32 base. others: the same base in other dtypes; the LoRA's weights are copied to it.
    """
    exact: Any = training.model
    for model in others.values():
        model.adapter.add(AVERAGE, deepcopy(exact.adapter.weights[AVERAGE]))
    for steps in at:
        while training.step < steps:
            training.train_step()
        examples = training.read(training.step, 0).to(exact.device)
        expected, errors = _gradient(exact, examples, training), {}
        for dtype, model in others.items():
            for state in (STUDENT, AVERAGE):
                model.adapter.weights[state].load_state_dict(exact.adapter.weights[state].state_dict())
            errors[dtype] = relative_and_cosine(_gradient(model, examples, training), expected)
        yield steps, errors


def relative_and_cosine(found: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """Return how far a gradient, in pieces, is from the exact one: relative error, and cosine of the angle."""
    a, b = (torch.cat([piece.flatten().double() for piece in pieces]) for pieces in (found, exact))
    return {
        "relative error": round(float((a - b).norm() / b.norm()), 5),
        "cosine": round(float(torch.nn.functional.cosine_similarity(a, b, dim=0)), 6),
    }


def _gradient(model: Model, examples: Examples[Any], training: Training) -> list[Tensor]:
    """Return the gradient of the student's weights, which is left empty."""
    model.adapter.state = STUDENT
    parameters = list(model.adapter.weights[STUDENT].parameters())
    step_losses(model, examples, training.method).mean().backward()
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    return found
