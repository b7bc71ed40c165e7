"""The training loop.

Flows in: a network with an adapter on it, and a dataset.  Flows out: the adapter, trained, in place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..config.memory_advice import memory_advice, when_training
from ..config.settings import Config
from ..data.dataset import Dataset
from ..errors import RunError
from ..models.unet.adapter import (
    adapter_tensors,
    add_average,
    embedding_parameters,
    load_adapter_tensors,
    update_average,
)
from ..models.unet.network import Network
from .checkpoint import Checkpoints
from .compiled import compile_unet
from .interrupt import Interrupted, asked_to_stop
from .optimizer import load_optimizer_state, make_optimizer, optimizer_state, set_rate
from .processes import ALONE, Processes
from .step import draw, step_losses

FLOAT16_SCALE = 1024.0  # of the loss, so that the gradients within a float16 UNet are not rounded to zero


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
    network: Network,
    parameters: Sequence[nn.Parameter],
    dataset: Dataset,
    config: Config,
    *,
    observers: Sequence[Observer] = (),
    checkpoints: Checkpoints | None = None,
    processes: Processes = ALONE,
) -> list[float]:
    """Train `parameters` up to step `config.training.steps`, from the newest of `checkpoints`, and return every loss.

    observers: called after each step, in the main process alone.  Raises NonFiniteError before a non-finite gradient
    would be applied, MemoryFullError, OSError when a checkpoint cannot be written, and Interrupted, all of them with
    the last checkpoint whole.
    """
    training = Training(network, parameters, dataset, config, processes)
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
    with bar, asked_to_stop() as asked, memory_advice(when_training(config, training.largest)):
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
                kept = "saved; the same command goes on from there" if save else "nothing was saved"
                raise Interrupted(f"stopped after step {training.step} of {steps}: {kept}")
    return training.losses


class Training:
    """All that changes while training, and how one step changes it."""

    def __init__(
        self,
        network: Network,
        parameters: Sequence[nn.Parameter],
        dataset: Dataset,
        config: Config,
        processes: Processes = ALONE,
    ) -> None:
        """Begin at step 0; raises UserError when the settings do not fit the processes or what is installed."""
        self.network, self.parameters, self.dataset, self.config = network, parameters, dataset, config
        self.processes = processes
        self.losses: list[float] = []
        self.optimizer = make_optimizer(parameters, config.training, embedding_parameters(network.unet))
        self.parts = processes.parts(config.training.batch, config.training.accumulate)
        self.scale = FLOAT16_SCALE if network.unet.dtype == torch.float16 else 1.0
        if config.method.ema_decay:
            add_average(network.unet)
        if config.training.gradient_checkpointing:
            network.unet.enable_gradient_checkpointing()
        if config.training.compile:
            compile_unet(network.unet)

    @property
    def step(self) -> int:
        """Number of steps that are done."""
        return len(self.losses)

    @property
    def largest(self) -> int:
        """Number of pictures that are in the UNet at a time, but for the teacher, which has each twice."""
        return max(part.stop - part.start for part in self.parts)

    def advance(self, asked: Callable[[], bool] = bool) -> tuple[StepRecord, bool]:
        """Do one step; `asked` tells whether this process is to stop, and what comes back whether any is."""
        began, training, dropout = time.perf_counter(), self.config.training, self.config.data.caption_dropout
        losses = self.parameters[0].new_zeros(training.batch)
        for rows in self.parts:
            batch = self.dataset.batch(self.step, training.batch, rows, seed=training.seed, caption_dropout=dropout)
            draws = draw(self.config, self.step, batch.latents.shape[1:])
            part = step_losses(self.network, batch, draws.of(rows), self.config)
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
            update_average(self.network.unet, self.config.method.ema_decay)
        self.losses.append(loss)
        seconds = time.perf_counter() - began
        record = StepRecord(
            self.step, loss, rate, norm, draws.times.t, draws.times.s, seen[:-2], training.batch, seconds
        )
        return record, bool(seen[-1])

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds: the adapters, what the optimizer remembers, and the losses."""
        return {
            **{f"adapter.{name}": tensor for name, tensor in adapter_tensors(self.network.unet).items()},
            **{f"optimizer.{name}": tensor for name, tensor in optimizer_state(self.optimizer).items()},
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Be as the training was that `tensors` is from; raises UserError when it had another adapter."""
        load_adapter_tensors(self.network.unet, _under("adapter.", tensors))
        load_optimizer_state(self.optimizer, _under("optimizer.", tensors))
        self.losses = tensors["losses"].tolist()


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
