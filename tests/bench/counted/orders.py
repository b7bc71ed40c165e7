"""Counts a step of the trainer beside one in the order of work of diffusers' script, and prints the ratios as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = map(str, (Path(__file__).parents[1], Path(__file__).parents[1] / "gpu", Path(__file__).parents[2]))

from bases import config_of, random_base  # noqa: E402
from counting import counting  # noqa: E402
from distill_loops import Separate  # noqa: E402
from steps import DTYPE, META, count_step  # noqa: E402

from plain_method import PLAIN  # noqa: E402
from trajectory_consistency.trainer.models.unet.families import Family  # noqa: E402
from trajectory_consistency.trainer.training.memory import (  # noqa: E402
    MemorySettings,
    _allocated,
    estimate_training,
)

CASES: dict[str, list[tuple[Family, int, int]]] = {
    "full": [("sd15", 512, 1), ("sd15", 512, 4)],
    "tiny": [("tiny", 64, 1)],
}


def ratios(size: str) -> Iterator[dict[str, Any]]:
    """Give ours / separate for each case; see distill_loops.py for what `separate` does."""
    for family, side, batch in CASES[size]:
        config, checkpoint = config_of(side, batch, method=PLAIN, device="cpu"), random_base(family, META)
        with _allocated([]) as allocations:
            separate = Separate(config, META, DTYPE, checkpoint)
            separate.step()
        with counting() as result:
            separate.step()
        ours, theirs = count_step(checkpoint, config, (side, side)).of(), result.of()
        estimate = estimate_training(checkpoint, MemorySettings.from_config(config, DTYPE))
        yield {
            "step": f"{family} {side} px, batch {batch}",
            "TFLOP": ours.flops / theirs.flops,
            "GB moved": ours.moved / theirs.moved,
            "kernels": ours.kernels / theirs.kernels,
            "ms": ours.seconds / theirs.seconds,
            "GB": estimate.training / allocations.peak,
        }


if __name__ == "__main__":
    print(json.dumps(list(ratios(sys.argv[1]))))
