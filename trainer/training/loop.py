"""The training loop: trains the adapter of a model in place."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...tcd.adapter import AVERAGE, STUDENT
from ..config.memory_advice import memory_advice, training_advice
from ..config.settings import Config
from ..data.dataset import Dataset
from ..errors import RunError, UserError
from ..models.seam import Model
from .checkpoint import Checkpoints
from .compiled import compile_network
from .examples import Prefetcher, draw_times_and_guidance
from .interrupt import Interrupted, watch_stop_signals
from .optimizer import load_optimizer_state, make_optimizer, optimizer_state, set_learning_rates
from .processes import ALONE, Processes
from .step import step_losses

FLOAT16_SCALE = 1024.0  # loss scale for a float16 network, so that small gradients are not rounded to zero


class NonFiniteError(RunError):
    """The loss or its gradient became NaN or infinite; training stopped before the weights were changed."""


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


Observer = Callable[[StepRecord], None]


def train(
    model: Model,
    dataset: Dataset,
    config: Config,
    *,
    observers: Sequence[Observer] = (),
    checkpoints: Checkpoints | None = None,
    processes: Processes = ALONE,
) -> list[float]:
    """Train the student's weights to step `config.training.steps`, from the newest checkpoint; return all losses.

    observers: called after each step, in the main process only. Raises UserError if the checkpoint is of a different
    adapter, NonFiniteError before a non-finite gradient is applied, MemoryFullError if memory runs out, OSError if a
    checkpoint cannot be written, and Interrupted if the user stopped the run. Checkpoints already saved stay complete.
    """
    training = Training(model, dataset, config, processes)
    saved = checkpoints.load_latest() if checkpoints else None
    if saved is not None:
        training.load_state_dict(saved)
    steps, batch = config.training.steps, config.training.batch
    can_recompute = not (model.always_recomputes or config.training.gradient_checkpointing)
    bar = tqdm(
        total=steps * batch,
        initial=training.step * batch,
        desc="distilling",
        unit="img",
        unit_scale=True,
        disable=not processes.is_main,
    )
    with (
        bar,
        training,
        watch_stop_signals() as stop_requested,
        memory_advice(training_advice(config, training.micro_batch_size, can_recompute=can_recompute)),
    ):
        while training.step < steps:
            record, stop = training.train_step(stop_requested)
            bar.update(batch)
            bar.set_postfix(loss=f"{_mean(training.losses[-50:]):.4f}", refresh=False)
            for observe in observers if processes.is_main else ():
                observe(record)
            save = checkpoints and (stop or training.step == steps or checkpoints.due(training.step))
            if checkpoints and save and processes.is_main:
                checkpoints.save(training.step, training.state_dict())
            if stop:
                kept = "saved; the same command resumes there" if save else "nothing was saved"
                raise Interrupted(f"stopped after step {training.step} of {steps}: {kept}")
    return training.losses


class Training:
    """The state of training and its step. As a context manager, it ends the prefetch thread."""

    def __init__(self, model: Model, dataset: Dataset, config: Config, processes: Processes = ALONE) -> None:
        """Start at step 0, with the adapter's student in place.

        Raises UserError if the batch cannot be divided over the processes, or bitsandbytes is needed and not installed.
        """
        self.model, self.config, self.processes = model, config, processes
        self.losses: list[float] = []
        student = model.adapter.weights[STUDENT]
        self.parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        embedding = [] if student.target_time is None else list(student.target_time.parameters())
        self.optimizer = make_optimizer(self.parameters, config.training, embedding)
        self.micro_batches = processes.micro_batches(config.training.batch, config.training.accumulate)
        kind = model.device.type
        self.prefetcher = Prefetcher(
            config, dataset, model.schedule, self.micro_batches, pin=kind == "cuda", ahead=kind != "cpu"
        )
        self.scale = FLOAT16_SCALE if model.dtype == torch.float16 else 1.0
        if config.method.ema_decay:
            model.adapter.add(AVERAGE, deepcopy(student).requires_grad_(False))
        model.adapter.state = STUDENT
        if config.training.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if config.training.compile:
            compile_network(model.network)

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self.prefetcher.close()

    @property
    def step(self) -> int:
        """Number of steps done."""
        return len(self.losses)

    @property
    def micro_batch_size(self) -> int:
        """Examples per micro-batch; in the guided teacher call each of them is two rows."""
        return max(rows.stop - rows.start for rows in self.micro_batches)

    def train_step(self, stop_requested: Callable[[], bool] = bool) -> tuple[StepRecord, bool]:
        """Do one step; return its record, and whether any process was asked to stop.

        stop_requested: returns whether this process was asked to stop. Raises NonFiniteError before a non-finite
        gradient is applied.
        """
        started, training = time.perf_counter(), self.config.training
        losses = self.parameters[0].new_zeros(training.batch)
        for index, rows in enumerate(self.micro_batches):
            examples = self.prefetcher.get(self.step, index).to(self.model.device)
            weighted = step_losses(self.model, examples, self.config)
            (weighted.sum() * (self.scale / training.batch)).backward()
            losses[rows] = weighted.detach()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        stops = losses.new_full((1,), float(stop_requested()))
        self.processes.all_reduce([*gradients, losses, stops])
        if self.scale != 1:
            torch._foreach_div_(gradients, self.scale)
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, training.clip)
        # The only synchronization with a GPU in a step: one copy of everything that is read here.
        results = torch.cat([losses, grad_norm.view(1), stops]).cpu()
        loss, norm = results[:-2].mean().item(), results[-2].item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm}; try a smaller training.lr, or "
                "base.dtype=float32"
            )
        lr = set_learning_rates(self.optimizer, self.step, training)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.method.ema_decay:
            self._update_average()
        schedule = self.model.schedule
        times = draw_times_and_guidance(self.config, schedule, self.step).times
        self.losses.append(loss)
        seconds = time.perf_counter() - started
        record = StepRecord(
            self.step, loss, lr, norm, times.t, times.s, schedule.num_times, results[:-2], training.batch, seconds
        )
        return record, bool(results[-1])

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds: student and average, the optimizer's state, and the losses so far."""
        return {
            **{f"adapter.{name}": tensor for name, tensor in self._weights().items()},
            **{f"optimizer.{name}": tensor for name, tensor in optimizer_state(self.optimizer).items()},
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned. Raises UserError if it belongs to a different adapter."""
        own, saved = self._weights(), _with_prefix("adapter.", tensors)
        if {name: tensor.shape for name, tensor in own.items()} != {name: each.shape for name, each in saved.items()}:
            raise UserError("the checkpoint belongs to a different adapter: choose another output.folder")
        for name, tensor in own.items():
            tensor.copy_(saved[name])
        load_optimizer_state(self.optimizer, _with_prefix("optimizer.", tensors))
        self.losses = tensors["losses"].tolist()

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
        average, student = (
            list[Tensor](self.model.adapter.weights[state].parameters()) for state in (AVERAGE, STUDENT)
        )
        torch._foreach_lerp_(average, student, 1 - self.config.method.ema_decay)


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
