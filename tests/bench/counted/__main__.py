"""Counts the work of a training step of models in full size, without a GPU and without their weights.

python tests/bench/counted --out FILE.md [--tiny]

The trainer's own code runs on the meta device, which computes no numbers, and each operation is counted: its FLOPs, and
the bytes that it reads and writes. The least time of an operation is the longer of the two at the published rates of a
card. --tiny: small models, for a test. The models of ComfyUI are counted in the environment of tests/engine, which is
made on the first call.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
HOST_PYTHON = ROOT / ".venv-comfyui" / ("Scripts" if os.name == "nt" else "bin") / "python"
Steps = Sequence[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    subprocess.run([sys.executable, ROOT / "tests" / "engine", "--version"], check=True)
    size = "tiny" if options.tiny else "full"
    steps = [*counted(sys.executable, "unets", size), *counted(HOST_PYTHON, "host", size)]
    orders = counted(sys.executable, "orders", size)
    options.out.write_text(report(steps, orders), encoding="utf-8")


def counted(python: str | Path, script: str, size: str) -> Steps:
    """Return what one of the scripts beside this one prints."""
    done = subprocess.run([python, HERE / f"{script}.py", size], check=True, stdout=subprocess.PIPE, text=True)
    steps: Steps = json.loads(done.stdout.splitlines()[-1])
    return steps


def report(steps: Steps, orders: Steps) -> str:
    """Return the tables as Markdown."""
    lines = [
        "| TFLOP a picture | all | teacher | target | student | gradient |",
        "|---|---|---|---|---|---|",
        *(_row(step["step"], "TFLOP", "teacher", "target", "student", "gradient", step=step) for step in steps),
        "",
        "| a step | kernels | GB read and written | ms at least | of them products | utilisation at most |",
        "|---|---|---|---|---|---|",
        *(
            _row(step["step"], "kernels", "GB moved", "ms", "ms of products", "utilisation", step=step)
            for step in steps
        ),
        "",
        "| GB, estimated | weights | adapter | step | all |",
        "|---|---|---|---|---|",
        *(_row(step["step"], "weights GB", "adapter GB", "step GB", "GB", step=step) for step in steps),
        "",
        "| share of the least time | longest operations |",
        "|---|---|",
        *(f"| {step['step']} | {_longest(step)} |" for step in steps),
        "",
        "| ours / separate | TFLOP | GB read and written | kernels | ms at least | peak memory |",
        "|---|---|---|---|---|---|",
        *(_row(step["step"], "TFLOP", "GB moved", "kernels", "ms", "GB", step=step) for step in orders),
        "",
    ]
    return "\n".join(lines)


def _row(label: str, *names: str, step: dict[str, Any]) -> str:
    return f"| {' | '.join([label, *(_number(step[name]) for name in names)])} |"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _longest(step: dict[str, Any]) -> str:
    return ", ".join(f"{name} {ms / step['ms']:.0%}" for name, ms in step["longest"].items())


if __name__ == "__main__":
    main()
