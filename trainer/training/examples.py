"""Reads the training examples: the latents and captions of a micro-batch, with their times, noise and guidance scales.

On a GPU, a thread reads the next micro-batch in advance.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ...tcd import Schedule
from ...tcd.distill import Examples, draw_examples
from ..config.settings import Config
from ..data.dataset import Dataset
from ..models.conditioning import Conditioning


def read_examples(
    config: Config, dataset: Dataset, schedule: Schedule, step: int, rows: slice
) -> Examples[Conditioning]:
    """Read some rows of a step's batch and draw their noise, times and guidance scales, on the CPU."""
    training = config.training
    batch = dataset.batch(step, training.batch, rows, seed=training.seed, caption_dropout=config.data.caption_dropout)
    return draw_examples(
        batch.latents,
        batch.cond,
        batch.uncond,
        rows,
        method=config.method,
        training=training,
        schedule=schedule,
        step=step,
    )


@dataclass
class Prefetcher:
    """Reads micro-batches; with `ahead`, a thread reads the next one while the current one is trained on."""

    config: Config
    dataset: Dataset
    schedule: Schedule
    micro_batches: Sequence[slice]
    """This process's rows of a step's batch, for each micro-batch."""
    pin: bool = False
    """Whether to read into page-locked memory, for asynchronous copies to a GPU."""
    ahead: bool = True
    """Whether to read the next micro-batch in advance; on a CPU the thread would slow the training down."""

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._next: tuple[tuple[int, int], Future[Examples[Conditioning]]] | None = None
        """((step, index), examples) of the micro-batch that is being read."""

    def get(self, step: int, index: int) -> Examples[Conditioning]:
        """Return micro-batch `index` of a step and, with `ahead`, start reading the next.

        Raises the errors of the thread that read it.
        """
        if self._next is not None and self._next[0] == (step, index):
            examples = self._next[1].result()
        else:
            examples = self._read(step, index)
        following = (step, index + 1) if index + 1 < len(self.micro_batches) else (step + 1, 0)
        self._next = None
        if self.ahead and following[0] < self.config.training.steps:
            self._next = (following, self._thread.submit(self._read, *following))
        return examples

    def close(self) -> None:
        """Wait until the read in progress is done, and end the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _read(self, step: int, index: int) -> Examples[Conditioning]:
        examples = read_examples(self.config, self.dataset, self.schedule, step, self.micro_batches[index])
        return examples.pin() if self.pin else examples
