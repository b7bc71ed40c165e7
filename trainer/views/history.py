"""What a run was like, step by step, in two CSV files that a run which goes on goes on with.

Flows in: the record of each step.  Flows out: `log.csv`, a row to a step, and `loss_by_time.csv`, the losses of each
step by t and by t - s; and both read back.
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
BIN, BINS = 100, 10
"""Training times to a bin of t, and of t - s, of which every clock has 1000, or 1001 with its clean end."""


class LogRow(NamedTuple):
    """One step in `log.csv`."""

    step: int
    """Number of steps that were done with this one."""
    loss: float
    lr: float
    norm: float
    """Of the gradient, before clipping."""
    images_per_second: float


class Cell(NamedTuple):
    """The pictures of one step whose times are in one bin: a row of `loss_by_time.csv`."""

    step: int
    t: int
    """The lowest t of the bin, in timesteps."""
    gap: int
    """The lowest t - s of the bin, in timesteps."""
    pictures: int
    loss: float
    """Mean over them."""


class History:
    """An observer that keeps both files in a folder; rows of steps that a run which goes on does again are dropped."""

    def __init__(self, folder: Path) -> None:
        """Keep the files in `folder`, which must be there when the first step is done."""
        self.log = _Rows(folder / LOG_NAME, LogRow._fields)
        self.by_time = _Rows(folder / BY_TIME_NAME, Cell._fields)
        self.begun = False

    def __call__(self, record: StepRecord) -> None:
        """Add a step to both files.

        Raises RunError or OSError, both of which say what to do, when the disk does not take it.
        """
        if not self.begun:
            self.log.drop_from(record.step)
            self.by_time.drop_from(record.step)
            self.begun = True
        speed = record.images / record.seconds
        self.log.append([LogRow(record.step, record.loss, record.lr, record.norm, speed)])
        self.by_time.append(cells(record))


def cells(record: StepRecord) -> list[Cell]:
    """The mean losses of a step by the bins of t and of t - s that its pictures are in, in their order."""
    t, gap = record.t.cpu(), (record.t - record.s).cpu()
    place = (t // BIN).clamp(max=BINS - 1) * BINS + (gap // BIN).clamp(max=BINS - 1)
    found = []
    for index in place.unique().tolist():
        losses = record.losses.cpu()[place == index]
        low_t, low_gap = index // BINS * BIN, index % BINS * BIN
        found.append(Cell(record.step, low_t, low_gap, len(losses), losses.mean().item()))
    return found


def read_log(folder: Path) -> list[LogRow]:
    """The rows of a run's `log.csv`; none when there is no such file."""
    return [LogRow(int(row[0]), *map(float, row[1:])) for row in _read(folder / LOG_NAME, LogRow._fields)]


def read_loss_by_time(folder: Path, since: int = 0) -> tuple[Tensor, Tensor]:
    """The mean loss and the number of pictures by bins of t and of t - s, float64 [BINS, BINS] each.

    since: steps up to this one are left out.  Where there is no picture the loss is NaN.
    """
    total, count = torch.zeros(2, BINS, BINS, dtype=torch.float64)
    for step, t, gap, pictures, loss in _read(folder / BY_TIME_NAME, Cell._fields):
        if int(step) > since:
            place = int(t) // BIN, int(gap) // BIN
            total[place] += int(pictures) * float(loss)
            count[place] += int(pictures)
    return total / count, count


class _Rows:
    """A CSV file that grows; the first number of each row is the step."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, columns

    def drop_from(self, step: int) -> None:
        """Keep the rows before `step` alone, and begin the file if it is not there."""
        kept = [row for row in _read(self.path, self.columns) if int(row[0]) < step]
        with atomic_write(self.path) as unfinished:
            unfinished.write_text(_lines([self.columns, *kept]), encoding="utf-8")

    def append(self, rows: Iterable[Sequence[object]]) -> None:
        """Add rows in one go, so that a run that is killed leaves at most one of them cut off, the last.

        Raises RunError, which says what to do, when the disk does not take them.
        """
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_lines(rows))
        except OSError as error:
            raise RunError(
                f"{self.path} could not be written: {error}; make room on the disk, then start the same command again: "
                "it goes on from the last checkpoint"
            ) from error


def _lines(rows: Iterable[Sequence[object]]) -> str:
    return "".join(
        ",".join(f"{value:.9g}" if isinstance(value, float) else str(value) for value in row) + "\n" for row in rows
    )


def _read(path: Path, columns: Sequence[str]) -> Iterator[list[str]]:
    """The rows of a file that are whole, without the one of names."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", newline="") as file:
        whole = (line for line in file if line.endswith("\n"))
        next(whole, None)
        yield from (row for row in csv.reader(whole) if len(row) == len(columns))
