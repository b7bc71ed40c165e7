"""Benchmark of the trainer: time and memory of a step, beside the order of work of diffusers' LCM LoRA script.

python tests/bench/training_step.py --out FILE.md [--steps N] [--side PIXELS] [--batch N] [--rank N] [--device cpu|cuda]

Both loops train the same full-size SD 1.5 of random weights (2.1 GB, made once in the user's cache), each in a process
of its own; they take turns, a step at a time. See distill_loops.py for what each does.
"""

import argparse
import os
import platform
import statistics
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "host"))

from full_size import full_size_sd15  # noqa: E402
from turns import Loop, in_turns  # noqa: E402

KINDS = "ours", "separate"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each, after one to warm up")
    parser.add_argument("--side", type=int, default=256, help="of the pictures, in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    settings = [options.side, options.batch, options.rank, options.device, dtype]
    loops = {kind: Loop(HERE / "distill_loops.py", kind, full_size_sd15(), *settings) for kind in KINDS}
    times = in_turns(loops, options.steps)
    peaks = {kind: loop.ask("peak") for kind, loop in loops.items()}
    for loop in loops.values():
        loop.close()
    options.out.write_text(report(times, peaks, options, dtype), encoding="utf-8")


def report(times: dict[str, list[float]], peaks: dict[str, float], options: argparse.Namespace, dtype: str) -> str:
    machine = torch.cuda.get_device_name() if options.device != "cpu" else f"{os.cpu_count()} CPU cores"
    ratio = statistics.median(a / b for a, b in zip(times["ours"], times["separate"], strict=True))
    lines = [
        "# A step of the trainer, beside the usual order of work",
        "",
        f"SD 1.5, full size, {options.side} x {options.side}, batch {options.batch}, rank {options.rank}, {dtype}, on "
        f"{platform.system()} {platform.machine()}, {machine}, torch {torch.__version__}; "
        f"{options.steps} steps in turns.",
        "",
        "| | seconds a step, median | peak memory, GB |",
        "|---|---|---|",
        *(f"| {kind} | {statistics.median(times[kind]):.2f} | {peaks[kind] / 1e9:.2f} |" for kind in KINDS),
        f"| ratio | **{ratio:.2f}** | **{peaks['ours'] / peaks['separate']:.2f}** |",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
