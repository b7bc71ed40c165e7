"""Counts steps of SD1.5 and SDXL in full size, and prints them as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = map(str, (Path(__file__).parents[1], Path(__file__).parents[1] / "gpu", Path(__file__).parents[2]))

from bases import config_of, random_base  # noqa: E402
from steps import DTYPE, META, count_step, figures_of  # noqa: E402

from trajectory_consistency.trainer.models.unet.families import Family  # noqa: E402
from trajectory_consistency.trainer.training.memory import MemorySettings, estimate_training  # noqa: E402

RECOMPUTED = {"gradient_checkpointing": True}
CASES: dict[str, list[tuple[Family, int, int, dict[str, bool]]]] = {
    "full": [
        ("sd15", 512, 1, {}),
        ("sd15", 512, 4, {}),
        ("sd15", 512, 16, {}),
        ("sd15", 512, 16, RECOMPUTED),
        ("sdxl", 1024, 1, RECOMPUTED),
        ("sdxl", 1024, 4, {}),
        ("sdxl", 1024, 4, RECOMPUTED),
    ],
    "tiny": [("tiny", 64, 2, {}), ("tiny", 64, 2, RECOMPUTED)],
}


def steps(size: str) -> Iterator[dict[str, Any]]:
    """Give the figures of each case."""
    for family, side, batch, training in CASES[size]:
        config, checkpoint = config_of(side, batch, device="cpu", **training), random_base(family, META)
        label = f"{family} {side} px, batch {batch}" + (", recomputed" if training else "")
        counted = count_step(checkpoint, config, (side, side))
        estimate = estimate_training(checkpoint, MemorySettings.from_config(config, DTYPE))
        yield figures_of(label, counted, batch, estimate, recomputed=bool(training))


if __name__ == "__main__":
    print(json.dumps(list(steps(sys.argv[1]))))
