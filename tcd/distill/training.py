"""A training step of the adapter, and what it changes: weights, their average, and the optimizer's moments."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapter import AVERAGE, STUDENT
from .examples import Examples, draw_times_and_guidance
from .loss_scale import LossScale
from .optimizer import load_optimizer_state, make_optimizer, optimizer_state, set_learning_rates
from .settings import Distillable, Method, Optimization
from .step import step_losses

MAX_SKIPPED = 5  # steps in a row; so a float16 network has time to halve its loss scale

Read = Callable[[int, int], Examples[Any]]
"""(step, index) -> the examples of a micro-batch, on the CPU; both are counted from 0."""


class NonFiniteError(ArithmeticError):
    """The loss or its gradient was NaN or infinite in several steps in a row, none of which changed the weights."""


class StepRecord(NamedTuple):
    """The result of one training step, over all processes."""

    step: int
    """Number of steps done, including this one."""
    loss: float
    """Mean loss of the batch."""
    lr: float
    """Learning rate of the LoRA."""
    norm: float
    """Norm of the gradient before clipping."""
    t: Tensor
    """Training times, int64 [B], on the CPU."""
    s: Tensor
    """Target times, int64 [B], on the CPU."""
    num_times: int
    """How many training times the schedule has: t and s are in 0 .. num_times - 1."""
    losses: Tensor
    """Weighted loss of each example, float32 [B], on the CPU."""
    images: int
    """B, the number of examples in the batch."""
    seconds: float
    """Wall-clock time of the step."""

    @property
    def skipped(self) -> bool:
        """Whether the step changed no weights, because its loss or gradient was not finite."""
        return not (math.isfinite(self.loss) and math.isfinite(self.norm))


class Training:
    """The state of training and its step."""

    def __init__(
        self,
        model: Distillable,
        read: Read,
        micro_batches: Sequence[slice],
        method: Method,
        training: Optimization,
        *,
        optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
        all_reduce: Callable[[Sequence[Tensor]], None] = lambda _: None,
    ) -> None:
        """Start at step 0, with the adapter's student in place.

        micro_batches: this process's rows of a step's batch, for each micro-batch. all_reduce: replaces each tensor, in
        place, by its sum over all processes.
        """
        self.model, self.read, self.micro_batches = model, read, micro_batches
        self.method, self.training, self.all_reduce = method, training, all_reduce
        self.losses: list[float] = []
        """The loss of each step; NaN for a step that was skipped."""
        student = model.adapter.weights[STUDENT]
        self.parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        embedding = [] if student.target_time is None else list(student.target_time.parameters())
        self.optimizer = make_optimizer(optimizer, self.parameters, training, embedding)
        self.scale = LossScale(model.dtype)
        if method.ema_decay:
            average = model.adapter.add(AVERAGE, deepcopy(student).requires_grad_(False))
            self._averaged = list[Tensor](average.parameters()), list[Tensor](student.parameters())
        model.adapter.state = STUDENT

    @property
    def step(self) -> int:
        """Number of steps done."""
        return len(self.losses)

    def train_step(self, stop_requested: Callable[[], bool] = bool) -> tuple[StepRecord, bool]:
        """Do one step; return its record, and whether any process was asked to stop.

        A step with a loss or gradient that is not finite counts, but changes no weights. Whether it is finite is known
        from sums over all processes, so all skip the same steps.
        stop_requested: returns whether this process was asked to stop. Raises NonFiniteError after MAX_SKIPPED such
        steps in a row, or if all steps of a shorter training were such.
        """
        started, training = time.perf_counter(), self.training
        losses = self.parameters[0].new_zeros(training.batch)
        for index, rows in enumerate(self.micro_batches):
            examples = self.read(self.step, index).to(self.model.device)
            weighted = step_losses(self.model, examples, self.method)
            (weighted.sum() * (self.scale.value / training.batch)).backward()
            losses[rows] = weighted.detach()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        stops = losses.new_full((1,), float(stop_requested()))
        self.all_reduce([*gradients, losses, stops])
        if self.scale.value != 1:
            torch._foreach_div_(gradients, self.scale.value)
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, training.clip)
        # The only synchronization with a GPU in a step: one copy of everything that is read here.
        results = torch.cat([losses, grad_norm.view(1), stops]).cpu()
        loss, norm = results[:-2].mean().item(), results[-2].item()
        lr = set_learning_rates(self.optimizer, self.step, training)
        self._update(loss, norm)
        schedule = self.model.schedule
        times = draw_times_and_guidance(self.method, training, schedule, self.step - 1).times
        seconds = time.perf_counter() - started
        record = StepRecord(
            self.step, loss, lr, norm, times.t, times.s, schedule.num_times, results[:-2], training.batch, seconds
        )
        return record, bool(results[-1])

    def _update(self, loss: float, norm: float) -> None:
        """Update the weights and their average, unless the loss or the gradient's norm is not finite; count the step.

        Raises NonFiniteError after MAX_SKIPPED steps in a row without an update.
        """
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.optimizer.step()
            if self.method.ema_decay:
                self._update_average()
        self.optimizer.zero_grad(set_to_none=True)
        self.scale.update(finite)
        self.losses.append(loss if finite else math.nan)
        most = min(MAX_SKIPPED, self.training.steps)
        if len(self.losses) >= most and all(map(math.isnan, self.losses[-most:])):
            raise NonFiniteError(
                f"step {self.step}: loss {loss}, gradient norm {norm}; no step was finite in {most} in a row"
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds: student and average, the optimizer's state, and the losses so far."""
        return {
            **{f"adapter.{name}": tensor for name, tensor in self._weights().items()},
            **{f"optimizer.{name}": tensor for name, tensor in optimizer_state(self.optimizer).items()},
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned. Raises ValueError if it belongs to a different adapter."""
        own, saved = self._weights(), _with_prefix("adapter.", tensors)
        if {name: tensor.shape for name, tensor in own.items()} != {name: each.shape for name, each in saved.items()}:
            raise ValueError("the checkpoint belongs to a different adapter")
        for name, tensor in own.items():
            tensor.copy_(saved[name])
        load_optimizer_state(self.optimizer, _with_prefix("optimizer.", tensors))
        self.losses = tensors["losses"].tolist()
        self.scale = LossScale(self.model.dtype, map(math.isfinite, self.losses))

    def _weights(self) -> dict[str, Tensor]:
        """Return the tensors (not copies) of the student and of its average as `STATE.NAME`."""
        return {
            f"{state}.{name}": tensor
            for state, weights in self.model.adapter.weights.items()
            if state in (STUDENT, AVERAGE)
            for name, tensor in weights.tensors().items()
        }

    @torch.no_grad()
    def _update_average(self) -> None:
        """EMA update: average = decay * average + (1 - decay) * student."""
        average, student = self._averaged
        torch._foreach_lerp_(average, student, 1 - self.method.ema_decay)


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
