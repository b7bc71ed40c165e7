"""The training loop: the adapter of a model, trained in place."""

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
from .examples import Reader, draw
from .interrupt import Interrupted, asked_to_stop
from .optimizer import load_optimizer_state, make_optimizer, optimizer_state, set_rate
from .processes import ALONE, Processes
from .step import step_losses

FLOAT16_SCALE = 1024.0  # of the loss, so that gradients within a float16 network are not rounded to zero


class NonFiniteError(RunError):
    """The loss or its gradient became NaN or infinite, and training stopped before it reached the weights."""


class StepRecord(NamedTuple):
    """What one step did."""

    step: int
    """Number of steps that are done with this one."""
    loss: float
    lr: float
    norm: float
    """Of the gradient, before clipping."""
    t: Tensor
    s: Tensor
    losses: Tensor
    """[B] each, on the CPU: the times and the loss of every picture of the step, of all processes."""
    images: int
    seconds: float


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
    """Train the student's weights up to step `config.training.steps`, from the newest checkpoint; return every loss.

    observers: called after each step, in the main process alone.  Raises NonFiniteError before a non-finite gradient
    would be applied, MemoryFullError, OSError when a checkpoint cannot be written, and Interrupted, all of them with
    the last checkpoint complete.
    """
    training = Training(model, dataset, config, processes)
    saved = checkpoints.latest() if checkpoints else None
    if saved is not None:
        training.restore(saved)
    steps, batch = config.training.steps, config.training.batch
    bar = tqdm(
        total=steps * batch,
        initial=training.step * batch,
        desc="distilling",
        unit="img",
        unit_scale=True,
        disable=not processes.main,
    )
    with bar, training, asked_to_stop() as asked, memory_advice(training_advice(config, training.largest)):
        while training.step < steps:
            record, stop = training.advance(asked)
            if processes.main:
                bar.update(batch)
                bar.set_postfix(loss=f"{_mean(training.losses[-50:]):.4f}", refresh=False)
                for observe in observers:
                    observe(record)
            save = checkpoints and (stop or training.step == steps or checkpoints.due(training.step))
            if checkpoints and save and processes.main:
                checkpoints.save(training.step, training.tensors())
            if stop:
                kept = "saved; the same command resumes there" if save else "nothing was saved"
                raise Interrupted(f"stopped after step {training.step} of {steps}: {kept}")
    return training.losses


class Training:
    """All that changes while training, and how one step changes it; a context, which ends its reading thread."""

    def __init__(self, model: Model, dataset: Dataset, config: Config, processes: Processes = ALONE) -> None:
        """Begin at step 0; raises UserError if the settings do not fit the processes or what is installed."""
        self.model, self.config, self.processes = model, config, processes
        self.losses: list[float] = []
        student = model.adapter.weights[STUDENT]
        self.parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        embedding = [] if student.target_time is None else list(student.target_time.parameters())
        self.optimizer = make_optimizer(self.parameters, config.training, embedding)
        self.parts = processes.parts(config.training.batch, config.training.accumulate)
        self.reader = Reader(config, dataset, model.schedule, self.parts, pin=model.device.type == "cuda")
        self.scale = FLOAT16_SCALE if model.dtype == torch.float16 else 1.0
        if config.method.ema_decay:
            model.adapter.add(AVERAGE, deepcopy(student).requires_grad_(False))
        model.adapter.state = STUDENT
        if config.training.gradient_checkpointing:
            model.recompute_activations()
        if config.training.compile:
            compile_network(model.network)

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()

    @property
    def step(self) -> int:
        """Number of steps that are done."""
        return len(self.losses)

    @property
    def largest(self) -> int:
        """Number of pictures that are in the network at a time; the guided teacher has each twice."""
        return max(part.stop - part.start for part in self.parts)

    def advance(self, asked: Callable[[], bool] = bool) -> tuple[StepRecord, bool]:
        """Do one step.

        asked: whether this process should stop; the returned bool says whether any process should.
        """
        began, training = time.perf_counter(), self.config.training
        losses = self.parameters[0].new_zeros(training.batch)
        for number, rows in enumerate(self.parts):
            examples = self.reader.get(self.step, number).to(self.model.device)
            part = step_losses(self.model, examples, self.config)
            (part.sum() * (self.scale / training.batch)).backward()
            losses[rows] = part.detach()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        stops = losses.new_full((1,), float(asked()))
        self.processes.add_up([*gradients, losses, stops])
        if self.scale != 1:
            torch._foreach_div_(gradients, self.scale)
        length = nn.utils.clip_grad_norm_(self.parameters, training.clip)
        seen = torch.cat([losses, length.view(1), stops]).cpu()  # the one time in a step that a GPU is waited for
        loss, norm = seen[:-2].mean().item(), seen[-2].item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm}; try a smaller training.lr, or "
                "base.dtype=float32"
            )
        rate = set_rate(self.optimizer, self.step, training)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.method.ema_decay:
            self._update_average()
        times = draw(self.config, self.model.schedule, self.step).times
        self.losses.append(loss)
        seconds = time.perf_counter() - began
        record = StepRecord(self.step, loss, rate, norm, times.t, times.s, seen[:-2], training.batch, seconds)
        return record, bool(seen[-1])

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds: adapter weights, what the optimizer remembers, and the losses."""
        return {
            **{f"adapter.{name}": tensor for name, tensor in self._weights().items()},
            **{f"optimizer.{name}": tensor for name, tensor in optimizer_state(self.optimizer).items()},
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state saved in `tensors`.

        Raises UserError if they belong to a different adapter.
        """
        own, saved = self._weights(), _under("adapter.", tensors)
        if {name: tensor.shape for name, tensor in own.items()} != {name: each.shape for name, each in saved.items()}:
            raise UserError("the checkpoint is of another adapter: choose another output.folder")
        for name, tensor in own.items():
            tensor.copy_(saved[name])
        load_optimizer_state(self.optimizer, _under("optimizer.", tensors))
        self.losses = tensors["losses"].tolist()

    def _weights(self) -> dict[str, Tensor]:
        """The tensors of the student and of its average, themselves, by state and name."""
        return {
            f"{state}.{name}": tensor
            for state, weights in self.model.adapter.weights.items()
            if state in (STUDENT, AVERAGE)
            for name, tensor in weights.tensors().items()
        }

    @torch.no_grad()
    def _update_average(self) -> None:
        """Move the average towards the student: average = decay * average + (1 - decay) * student."""
        average, student = (
            list[Tensor](self.model.adapter.weights[state].parameters()) for state in (AVERAGE, STUDENT)
        )
        torch._foreach_lerp_(average, student, 1 - self.config.method.ema_decay)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
