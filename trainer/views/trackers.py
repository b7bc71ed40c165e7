"""Logs each training step and preview to TensorBoard and Weights & Biases, if the configuration enables them."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import asdict
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ...tcd.distill import StepRecord
from ..config.settings import Config, LogConfig
from ..errors import UserError
from .history import bin_edges, loss_bins


class Tracker(Protocol):
    """An observer of the training loop that is also shown the grids of the previews."""

    def __call__(self, record: StepRecord) -> None:
        """Log a step."""
        ...

    def show(self, step: int, grid: Path) -> None:
        """Log a picture file, after the step itself."""
        ...


def check_installed(log: LogConfig) -> None:
    """Raise UserError if the package of an enabled tracker is not installed."""
    for enabled, key, package, command in (
        (log.tensorboard, "log.tensorboard", "tensorboard", "pip install tensorboard"),
        (log.wandb_project, "log.wandb_project", "wandb", "pip install wandb, then wandb login"),
    ):
        if enabled and find_spec(package) is None:
            raise UserError(f"{key} is set, but {package} is not installed: {command}, or leave it out")


def start_trackers(config: Config) -> list[Tracker]:
    """Return the trackers that the configuration enables; `check_installed` must have passed."""
    trackers: list[Tracker] = []
    if config.log.tensorboard:
        trackers.append(TensorBoard(config.output_folder / "tensorboard"))
    if config.log.wandb_project:
        trackers.append(WeightsAndBiases(config))
    return trackers


def scalars(record: StepRecord) -> dict[str, float]:
    """Return the numbers to log for a step, by name; among them the mean loss in each bin of t and of t - s in use."""
    named = {
        "loss": record.loss,
        "learning rate": record.lr,
        "gradient norm": record.norm,
        "images per second": record.images / record.seconds,
    }
    rows, edges = loss_bins(record), bin_edges(record.num_times)
    for name, column in (("t", "t"), ("t - s", "gap")):
        for low, end in pairwise(edges):
            if inside := [row for row in rows if getattr(row, column) == low]:
                mean = sum(row.pictures * row.loss for row in inside) / sum(row.pictures for row in inside)
                named[f"loss by {name}/{low:03}-{end - 1}"] = mean
    return named


class TensorBoard:
    """An observer that writes event files. When a run resumes, TensorBoard hides the steps that are repeated."""

    def __init__(self, folder: Path) -> None:
        """Write event files into `folder`, from the first step on."""
        self.folder = folder
        self.writer: Any = None

    def __call__(self, record: StepRecord) -> None:
        """Log a step."""
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=record.step)
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record.step)

    def show(self, step: int, grid: Path) -> None:
        """Log a picture file, after the step itself."""
        with Image.open(grid) as image:
            self.writer.add_image("previews", np.asarray(image.convert("RGB")), step, dataformats="HWC")


class WeightsAndBiases:
    """An observer that logs to the user's Weights & Biases project; a resumed training continues the same W&B run."""

    def __init__(self, config: Config) -> None:
        """Start a W&B run, or resume that of the same output folder and seed."""
        self.wandb: Any = importlib.import_module("wandb")
        folder = str(config.output_folder.resolve())
        self.run = self.wandb.init(
            project=config.log.wandb_project,
            name=config.output_folder.name,
            id=hashlib.sha256(f"{folder}\n{config.training.seed}".encode()).hexdigest()[:16],
            resume="allow",
            dir=str(config.output_folder),
            config=asdict(config),
        )

    def __call__(self, record: StepRecord) -> None:
        """Log a step."""
        self.run.log(scalars(record), step=record.step)

    def show(self, step: int, grid: Path) -> None:
        """Log a picture file, after the step itself."""
        self.run.log({"previews": self.wandb.Image(str(grid))}, step=step)
