"""A real small training: the demo's students, trained for as long as the time that is left allows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import Bench

MEASURES = "to_teacher", "to_world", "difference"
STEPS, RESERVE = 4000, 20.0  # training steps of each LoRA; seconds that are left for ending the benchmark


def run(bench: Bench) -> None:
    """Run the demo with several times its iterations, and keep its measures; too little time ends it."""
    with bench.case("demo") as has_time, TemporaryDirectory() as folder:
        if not has_time:
            return
        out, steps = Path(folder, "demo"), 2 if bench.dry else STEPS
        command = [sys.executable, "-m", "trajectory_consistency.trainer.demo", "--out", str(out)]
        command += ["--steps", str(steps), *(["--samples", "4"] if bench.dry else [])]
        environment = {**os.environ, "HOME": folder}  # where there is no ComfyUI, whose rows the demo would add
        environment.pop("COMFYUI_PATH", None)
        try:
            done = subprocess.run(
                command, timeout=max(bench.seconds_left() - RESERVE, 1.0), capture_output=True, env=environment
            )
        except subprocess.TimeoutExpired:
            bench.keep(f"demo of {steps} steps", "skipped: it took longer than the time that was left")
            return
        found = list(Path(folder).rglob("metrics.json"))
        if not found:
            raise RuntimeError(f"the demo wrote no result: {done.stderr[-500:].decode(errors='replace')}")
        for row, measures in json.loads(found[0].read_text(encoding="utf-8")).items():
            bench.keep(f"demo of {steps} steps, {row}", {name: measures.get(name) for name in MEASURES})
