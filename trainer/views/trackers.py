"""Steps shown in TensorBoard and in Weights & Biases, where they are installed and asked for.

Flows in: the record of each step.  Flows out: the same numbers to both.
"""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..config.settings import Config, LogConfig
from ..errors import UserError
from ..training.loop import Observer, StepRecord
from .history import BIN, cells


def require(log: LogConfig) -> None:
    """Raise UserError when a tracker is asked for that is not installed."""
    for asked, key, package, how in (
        (log.tensorboard, "log.tensorboard", "tensorboard", "pip install tensorboard"),
        (log.wandb_project, "log.wandb_project", "wandb", "pip install wandb, then wandb login"),
    ):
        if asked and find_spec(package) is None:
            raise UserError(f"{key} is set, but {package} is not installed: {how}, or leave it out")


def trackers(config: Config) -> list[Observer]:
    """The trackers that a configuration asks for, which must be installed."""
    found: list[Observer] = []
    if config.log.tensorboard:
        found.append(TensorBoard(config.output_folder / "tensorboard"))
    if config.log.wandb_project:
        found.append(WeightsAndBiases(config))
    return found


def numbers(record: StepRecord) -> dict[str, float]:
    """What a step's record is in numbers, by name; losses by t and by t - s for the bins that have a picture in it."""
    found = {
        "loss": record.loss,
        "learning rate": record.lr,
        "gradient norm": record.norm,
        "images per second": record.images / record.seconds,
    }
    binned = cells(record)
    for name, low in (("t", 1), ("t - s", 2)):
        for edge in sorted({cell[low] for cell in binned}):
            inside = [cell for cell in binned if cell[low] == edge]
            mean = sum(cell.pictures * cell.loss for cell in inside) / sum(cell.pictures for cell in inside)
            found[f"loss by {name}/{edge:03}-{edge + BIN - 1}"] = mean
    return found


class TensorBoard:
    """An observer that writes event files; those of steps that are done again are marked as gone."""

    def __init__(self, folder: Path) -> None:
        """Write into `folder`."""
        self.folder = folder
        self.writer: Any = None

    def __call__(self, record: StepRecord) -> None:
        """Add a step."""
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=record.step)
        for name, value in numbers(record).items():
            self.writer.add_scalar(name, value, record.step)


class WeightsAndBiases:
    """An observer that logs to a run of one's own project, which is known again when the training goes on."""

    def __init__(self, config: Config) -> None:
        """Begin the run, or go on with it."""
        wandb = importlib.import_module("wandb")
        place = str(config.output_folder.resolve())
        self.run = wandb.init(
            project=config.log.wandb_project,
            name=config.output_folder.name,
            id=hashlib.sha256(f"{place}\n{config.training.seed}".encode()).hexdigest()[:16],
            resume="allow",
            dir=str(config.output_folder),
            config=asdict(config),
        )

    def __call__(self, record: StepRecord) -> None:
        """Add a step."""
        self.run.log(numbers(record), step=record.step)
