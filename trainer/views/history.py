"""Writes and reads the two CSV files of a run: log.csv, one row a step, and loss_by_time.csv, losses by t and t - s.

A resumed run continues both files.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..atomic import atomic_write
from ..errors import RunError
from ..training.loop import StepRecord

LOG_NAME, BY_TIME_NAME = "log.csv", "loss_by_time.csv"
BIN_WIDTH, BIN_COUNT = 100, 10
"""Timesteps in a bin of t or t - s, and number of bins. Training times are 0 ... 999, or 0 ... 1000 in flow models."""


class LogRow(NamedTuple):
    """One row of log.csv."""

    step: int
    """Number of completed training steps, from 1."""
    loss: float
    lr: float
    norm: float
    """Norm of the gradient before clipping."""
    images_per_second: float


class BinRow(NamedTuple):
    """One row of loss_by_time.csv: the pictures of one step whose t and t - s are in the same two bins."""

    step: int
    t: int
    """The lowest t of the bin, in training timesteps."""
    gap: int
    """The lowest t - s of the bin, in training timesteps."""
    pictures: int
    loss: float
    """Mean loss of these pictures."""


class History:
    """An observer of the training loop that appends each step to both files.

    When a run resumes, the rows of the steps that are repeated are removed first.
    """

    def __init__(self, folder: Path) -> None:
        """Write into `folder`, which must exist when the first step is complete."""
        self.log = _CsvFile(folder / LOG_NAME, LogRow._fields)
        self.by_time = _CsvFile(folder / BY_TIME_NAME, BinRow._fields)
        self.started = False

    def __call__(self, record: StepRecord) -> None:
        """Append a step to both files; raises RunError or OSError, with advice, if a file cannot be written."""
        if not self.started:
            self.log.drop_from(record.step)
            self.by_time.drop_from(record.step)
            self.started = True
        speed = record.images / record.seconds
        self.log.append([LogRow(record.step, record.loss, record.lr, record.norm, speed)])
        self.by_time.append(loss_bins(record))


def loss_bins(record: StepRecord) -> list[BinRow]:
    """Return the mean loss of a step in each bin of t and t - s that has a picture, in ascending order."""
    t, gap = record.t.cpu(), (record.t - record.s).cpu()
    indices = (t // BIN_WIDTH).clamp(max=BIN_COUNT - 1) * BIN_COUNT + (gap // BIN_WIDTH).clamp(max=BIN_COUNT - 1)
    rows = []
    for index in indices.unique().tolist():
        losses = record.losses.cpu()[indices == index]
        low_t, low_gap = index // BIN_COUNT * BIN_WIDTH, index % BIN_COUNT * BIN_WIDTH
        rows.append(BinRow(record.step, low_t, low_gap, len(losses), losses.mean().item()))
    return rows


def read_log(folder: Path) -> list[LogRow]:
    """Return the rows of the log.csv in a run's folder; an empty list if there is no such file."""
    return [LogRow(int(row[0]), *map(float, row[1:])) for row in _read(folder / LOG_NAME, LogRow._fields)]


def read_loss_by_time(folder: Path, since: int = 0) -> tuple[Tensor, Tensor]:
    """Return the mean loss and the number of pictures in each bin of t (rows) and t - s (columns).

    Both are float64 [BIN_COUNT, BIN_COUNT]; the loss of a bin without pictures is NaN. since: only later steps count.
    """
    total, count = torch.zeros(2, BIN_COUNT, BIN_COUNT, dtype=torch.float64)
    for step, t, gap, pictures, loss in _read(folder / BY_TIME_NAME, BinRow._fields):
        if int(step) > since:
            index = int(t) // BIN_WIDTH, int(gap) // BIN_WIDTH
            total[index] += int(pictures) * float(loss)
            count[index] += int(pictures)
    return total / count, count


class _CsvFile:
    """A CSV file with a header, whose first column is the step."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, columns

    def drop_from(self, step: int) -> None:
        """Remove the rows from `step` on; creates the file if there is none."""
        kept = [row for row in _read(self.path, self.columns) if int(row[0]) < step]
        with atomic_write(self.path) as unfinished:
            unfinished.write_text(_lines([self.columns, *kept]), encoding="utf-8")

    def append(self, rows: Iterable[Sequence[object]]) -> None:
        """Append rows; raises RunError, with advice, if that fails."""
        try:
            # One write for all rows, so that if the process is killed only the last row on disk can be incomplete.
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_lines(rows))
        except OSError as error:
            raise RunError(
                f"{self.path} could not be written: {error}; make room on the disk, then run the same command again "
                "to resume from the last checkpoint"
            ) from error


def _lines(rows: Iterable[Sequence[object]]) -> str:
    return "".join(
        ",".join(f"{value:.9g}" if isinstance(value, float) else str(value) for value in row) + "\n" for row in rows
    )


def _read(path: Path, columns: Sequence[str]) -> Iterator[list[str]]:
    """Yield the complete rows of a file, without its header; a last line that was cut off is skipped."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", newline="") as file:
        complete = (line for line in file if line.endswith("\n"))
        next(complete, None)
        yield from (row for row in csv.reader(complete) if len(row) == len(columns))
