"""What all parts of the benchmark measure with: time, memory, FLOPs, and the file of the results."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import flops  # noqa: F401, adds a formula to the registry
import torch
from torch.utils.flop_counter import FlopCounterMode

MATRIX = 8192  # side of the matrices whose product is the yardstick


class Timed(NamedTuple):
    """Of each of some equal steps."""

    seconds: float
    peak: int
    """The most memory that torch had allocated, in bytes, weights included; 0 on a CPU."""


class Bench:
    """A device, the results so far, and the time that is left."""

    def __init__(self, out: Path, *, dry: bool, deadline: float) -> None:
        self.dry, self._out, self._deadline = dry, out, deadline
        self.device = torch.device("cpu" if dry else "cuda")
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.results: dict[str, Any] = {
            "torch": torch.__version__,
            "card": platform.processor() or platform.machine() if dry else torch.cuda.get_device_name(),
        }
        self._prefix = ""
        self.rate = self._matrix_rate()
        self.keep("TFLOP/s of a matrix product", round(self.rate / 1e12, 3))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Name the results within the block after a part; an error within it is a result too."""
        self._prefix, began = f"{name}: ", time.monotonic()
        try:
            yield
        except Exception as error:
            self.keep("ended by", f"{type(error).__name__}: {error}")
            if self.dry:
                raise
        self.keep("seconds of the part", round(time.monotonic() - began, 1))
        self._prefix = ""

    def keep(self, name: str, value: Any) -> None:
        """Add a result, and write all so far."""
        self.results[self._prefix + name] = value
        print(f"{self._prefix}{name}: {value}", flush=True)
        self._out.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")

    @contextmanager
    def case(self, name: str) -> Iterator[bool]:
        """Give whether there is time left for a case, and free its memory; too little memory is its result."""
        has_time = time.monotonic() < self._deadline
        if not has_time:
            self.keep(name, "skipped: no time left")
        try:
            yield has_time
        except torch.OutOfMemoryError as error:
            self.keep(name, f"out of memory: {str(error).splitlines()[0]}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seconds_left(self) -> float:
        """Return how many seconds are left."""
        return self._deadline - time.monotonic()

    def time(self, step: Callable[[], object], steps: int, *, warm_up: int = 2) -> Timed:
        """Time equal steps together, with one wait at the end, after some to warm up."""
        for _ in range(warm_up):
            step()
        self.wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        self.wait()
        seconds = (time.perf_counter() - began) / steps
        return Timed(seconds, torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0)

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def figures(self, timed: Timed, images: int, flops_of_an_image: float) -> Mapping[str, float]:
        """Return the figures of a training step.

        flops_of_an_image: of all passes, without those that recomputation repeats. Their share of the matrix product's
        rate is the utilisation (MFU), measured on the same card in the same run.
        """
        rate = images * flops_of_an_image / timed.seconds
        return {
            "ms a step": round(1e3 * timed.seconds, 2),
            "images/s": round(images / timed.seconds, 3),
            "peak GB": round(timed.peak / 1e9, 3),
            "TFLOP/s": round(rate / 1e12, 3),
            "utilisation": round(rate / self.rate, 3),
        }

    def _matrix_rate(self) -> float:
        """Return the FLOPs a second of a product of large matrices in the dtype of training."""
        side = 256 if self.dry else MATRIX
        a, b = (torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(2))
        return 2 * side**3 / self.time(lambda: a @ b, 10, warm_up=3).seconds


def count_flops(step: Callable[[], object], steps: int) -> float:
    """Return the FLOPs of each of some steps, on average; how many rows need the target differs from step to step."""
    with FlopCounterMode(display=False) as counter:
        for _ in range(steps):
            step()
    return counter.get_total_flops() / steps


def busy_share(intervals: list[tuple[float, float]]) -> float:
    """Return which share of the time from the first start to the last end at least one interval (start, end) covers."""
    if not intervals:
        return 0.0
    covered, reached = 0.0, min(start for start, _ in intervals)
    began = reached
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered / (reached - began) if reached > began else 1.0
