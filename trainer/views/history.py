"""Writes and reads the two CSV files of a run: log.csv, one row a step, and loss_by_time.csv, losses by t and t - s.

A resumed run continues both files.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from ...tcd.distill import StepRecord
from ...tcd.files.atomic import atomic_write, write_advice
from ..errors import RunError, UserError

LOG_NAME, BY_TIME_NAME = "log.csv", "loss_by_time.csv"
BIN_COUNT = 10
"""Number of bins of t, and of t - s; each is a tenth of the schedule's training times."""


class LogRow(NamedTuple):
    """One row of log.csv."""

    step: int
    """Number of completed training steps, from 1."""
    loss: float
    lr: float
    norm: float
    """Norm of the gradient before clipping."""
    images_per_second: float

    @property
    def skipped(self) -> bool:
        """Whether the step changed no weights, because its loss or gradient was not finite."""
        return not (math.isfinite(self.loss) and math.isfinite(self.norm))


class BinRow(NamedTuple):
    """One row of loss_by_time.csv: the pictures of one step whose t and t - s are in the same two bins."""

    step: int
    t: int
    """The lowest t of the bin, in training times."""
    gap: int
    """The lowest t - s of the bin, in training times."""
    num_times: int
    """How many training times there are, in all bins together."""
    pictures: int
    loss: float
    """Mean loss of these pictures."""


Row = TypeVar("Row", LogRow, BinRow)


class LossByTime(NamedTuple):
    """The losses of many steps by t (rows) and t - s (columns)."""

    loss: Tensor
    """Mean loss in each bin, float64 [BIN_COUNT, BIN_COUNT]; NaN in a bin without pictures."""
    pictures: Tensor
    """Number of pictures in each bin, of the same shape."""
    edges: list[int]
    """As `bin_edges`."""


class History:
    """An observer of the training loop that appends each step to both files.

    When a run resumes, the rows of the steps that are repeated are removed first.
    """

    def __init__(self, folder: Path) -> None:
        """Write into `folder`, which must exist when the first step is complete."""
        self.log = _CsvFile(folder / LOG_NAME, LogRow)
        self.by_time = _CsvFile(folder / BY_TIME_NAME, BinRow)
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
    """Return the mean loss of a step in each bin of t and t - s that has a picture, in ascending order.

    A step that was skipped has none.
    """
    if record.skipped:
        return []
    t, gap = (time.cpu() * BIN_COUNT // record.num_times for time in (record.t, record.t - record.s))
    indices, edges = t * BIN_COUNT + gap, bin_edges(record.num_times)
    rows = []
    for index in indices.unique().tolist():
        losses = record.losses.cpu()[indices == index]
        low_t, low_gap = edges[index // BIN_COUNT], edges[index % BIN_COUNT]
        rows.append(BinRow(record.step, low_t, low_gap, record.num_times, len(losses), losses.mean().item()))
    return rows


def bin_edges(num_times: int) -> list[int]:
    """Return the lowest training time of each bin, and num_times last: bin k has those with time * 10 // num_times = k.

    They are 0, 100 ... 1000 for 1000 timesteps, and 0, 101, 201 ... 1001 for the 1001 times of a flow.
    """
    return [-(-k * num_times // BIN_COUNT) for k in range(BIN_COUNT + 1)]


def read_log(folder: Path) -> list[LogRow]:
    """Return the rows of the log.csv in a run's folder; an empty list if there is no such file.

    Raises UserError if the file is damaged.
    """
    return list(_read(folder / LOG_NAME, LogRow))


def read_loss_by_time(folder: Path, since: int = 0) -> LossByTime | None:
    """Return the losses in the loss_by_time.csv of a run's folder, or None if it has none.

    since: only later steps count. Raises UserError if the file is damaged.
    """
    total, count = torch.zeros(2, BIN_COUNT, BIN_COUNT, dtype=torch.float64)
    num_times = 0
    for step, t, gap, num_times, pictures, loss in _read(folder / BY_TIME_NAME, BinRow):
        if not (0 <= t < num_times and 0 <= gap < num_times and 0 <= pictures < 2**31):
            raise UserError(f"{folder / BY_TIME_NAME} is damaged (step {step}, t {t}, gap {gap}): repair or remove it")
        if step > since:
            index = t * BIN_COUNT // num_times, gap * BIN_COUNT // num_times
            total[index] += pictures * loss
            count[index] += pictures
    return LossByTime(total / count, count, bin_edges(num_times)) if count.any() else None


class _CsvFile(Generic[Row]):
    """A CSV file with a header, whose first column is the step."""

    def __init__(self, path: Path, kind: type[Row]) -> None:
        self.path = path
        self.kind: type[Row] = kind

    def drop_from(self, step: int) -> None:
        """Remove the rows from `step` on; creates the file if there is none. Raises UserError if it is damaged."""
        kept: list[Row] = [row for row in _read(self.path, self.kind) if row.step < step]
        with atomic_write(self.path) as unfinished:
            unfinished.write_text(_lines([self.kind._fields, *kept]), encoding="utf-8")

    def append(self, rows: Iterable[Sequence[object]]) -> None:
        """Append rows; raises RunError, with advice, if that fails."""
        try:
            # One write for all rows, so that if the process is killed only the last row on disk can be incomplete.
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_lines(rows))
        except OSError as error:
            raise RunError(
                f"{self.path} could not be written: {error}; {write_advice(self.path, error)}, then run the same "
                "command again to resume from the last checkpoint"
            ) from error


def _lines(rows: Iterable[Sequence[object]]) -> str:
    return "".join(
        ",".join(f"{value:.9g}" if isinstance(value, float) else str(value) for value in row) + "\n" for row in rows
    )


def _read(path: Path, kind: type[Row]) -> Iterator[Row]:
    """Yield the complete rows of a file, without its header; a last line that was cut off is skipped.

    Raises UserError if a row is not of numbers, as when the file is damaged.
    """
    if not path.exists():
        return
    types = get_type_hints(kind).values()
    with open(path, encoding="utf-8", newline="") as file:
        complete = (line for line in file if line.endswith("\n"))
        try:
            next(complete, None)
            rows = (row for row in csv.reader(complete) if len(row) == len(kind._fields))
            yield from (kind(*(number(text) for number, text in zip(types, row, strict=True))) for row in rows)
        except (ValueError, csv.Error) as error:
            raise UserError(f"{path} is damaged ({error}): repair or remove it") from error
