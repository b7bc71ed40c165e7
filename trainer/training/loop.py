"""The training loop: trains the adapter of a model in place."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

from tqdm import tqdm

from ...tcd import distill
from ...tcd.distill import NonFiniteError, StepRecord
from ...tcd.distill.memory import memory_advice
from ..config.memory_advice import training_advice
from ..config.settings import Config
from ..data.dataset import Dataset
from ..errors import RunError, UserError
from ..models.seam import Model
from .checkpoint import Checkpoints
from .compiled import compile_network
from .examples import Prefetcher
from .interrupt import Interrupted, watch_stop_signals
from .optimizer import optimizer_class
from .processes import ALONE, Processes

log = logging.getLogger("trajectory-consistency")
Observer = Callable[[StepRecord], None]


class DivergedError(RunError):
    """The loss or its gradient was NaN or infinite in several steps in a row, none of which changed the weights."""


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

    observers: called after each step, in the main process only. A loss is NaN if its step was skipped, because loss or
    gradient were not finite.
    Raises UserError if the checkpoint is of a different adapter, DivergedError after several such steps in a row,
    MemoryFullError if memory runs out, OSError if a checkpoint cannot be written, and Interrupted if the user stopped
    the run. Checkpoints already saved stay complete.
    """
    training = Training(model, dataset, config, processes)
    _resume(training, checkpoints, processes)
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
            if processes.is_main:
                _report(record, observers)
            save = checkpoints and (stop or training.step == steps or checkpoints.due(training.step))
            if checkpoints and save and processes.is_main:
                checkpoints.save(training.step, training.state_dict())
            if stop:
                kept = "saved; the same command resumes there" if save else "nothing was saved"
                raise Interrupted(f"stopped after step {training.step} of {steps}: {kept}")
    return training.losses


class Training(distill.Training):
    """Training on a dataset. As a context manager, it ends the prefetch thread."""

    def __init__(self, model: Model, dataset: Dataset, config: Config, processes: Processes = ALONE) -> None:
        """Start at step 0, with the adapter's student in place.

        Raises UserError if the batch cannot be divided over the processes, or bitsandbytes is needed and not installed.
        """
        micro_batches = processes.micro_batches(config.training.batch, config.training.parts)
        kind = model.device.type
        self.prefetcher = Prefetcher(
            config, dataset, model.schedule, micro_batches, pin=kind == "cuda", ahead=kind != "cpu"
        )
        super().__init__(
            model,
            self.prefetcher.get,
            micro_batches,
            config.method,
            config.training,
            optimizer=optimizer_class(config.training),
            all_reduce=processes.all_reduce,
        )
        if config.training.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if config.training.compile:
            compile_network(model.network)

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self.prefetcher.close()

    @property
    def micro_batch_size(self) -> int:
        """Examples per micro-batch; in the guided teacher call each of them is two rows."""
        return max(rows.stop - rows.start for rows in self.micro_batches)

    def train_step(self, stop_requested: Callable[[], bool] = bool) -> tuple[StepRecord, bool]:
        """Do one step, as `distill.Training`. Raises DivergedError where that raises NonFiniteError."""
        try:
            return super().train_step(stop_requested)
        except NonFiniteError as error:
            raise DivergedError(
                f"{error}; try a smaller training.lr, or base.dtype=float32, with a different output.folder"
            ) from error


def _report(record: StepRecord, observers: Sequence[Observer]) -> None:
    if record.skipped:
        log.warning("step %d is skipped: loss %g, gradient norm %g", record.step, record.loss, record.norm)
    for observe in observers:
        observe(record)


def _resume(training: Training, checkpoints: Checkpoints | None, processes: Processes) -> None:
    """Load the newest checkpoint, if there is one."""
    saved = checkpoints.load_latest(processes) if checkpoints else None
    if saved is None:
        return
    try:
        training.load_state_dict(saved)
    except ValueError as error:
        raise UserError(f"{error}: choose another output.folder") from error


def _mean(losses: Sequence[float]) -> float:
    """Return the mean of the losses that are not NaN; NaN without any."""
    finite = [loss for loss in losses if not math.isnan(loss)]
    return sum(finite) / len(finite) if finite else math.nan
