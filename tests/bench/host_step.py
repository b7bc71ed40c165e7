"""Benchmark of training on ComfyUI's models: a step of the trainer, beside a step of ComfyUI's own TrainLoraNode.

python tests/bench/host_step.py --out FILE.md [--steps N] [--rank N] [FAMILY...]

Each loop trains the same stand-in of a model family, in a process of its own; they take turns, a step at a time. See
host_loops.py for what each does. They run in the environment of tests/engine, which is made on the first call.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROGRAMS = ROOT / ".venv-comfyui" / ("Scripts" if os.name == "nt" else "bin")
sys.path.append(str(HERE.parent / "host" / "scripts"))

from families import FAMILIES  # noqa: E402
from turns import Loop, in_turns  # noqa: E402

TIMED = "ours", "node", "blocks"
SMALL = [name for name, family in FAMILIES.items() if not family.is_lent]


class Figures(NamedTuple):
    """Figures of one model, by loop."""

    seconds: dict[str, list[float]]
    """Of each step."""
    peaks: dict[str, float | None]
    """In bytes; None where the network has no gradient."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=SMALL, help="by default all small ones")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each, after one to warm up")
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    subprocess.run([sys.executable, ROOT / "tests" / "engine", "--version"], check=True)
    with TemporaryDirectory() as folder:
        measured = {name: measure(name, folder, options.steps, options.rank) for name in options.families}
    options.out.write_text(report(measured, options), encoding="utf-8")


def measure(name: str, folder: str, steps: int, rank: int) -> Figures:
    """Measure all loops on a family's stand-in."""

    def start(kind: str) -> Loop:
        return Loop(HERE / "host_loops.py", kind, name, folder, rank, python=PROGRAMS / "python")

    print(name, flush=True)
    loops = {kind: start(kind) for kind in TIMED}
    seconds = in_turns(loops, steps)
    peaks: dict[str, float | None] = {kind: loop.ask("peak") for kind, loop in loops.items()}
    for loop in loops.values():
        loop.close()
    kept = start("kept")
    try:
        kept.ask("step")
        peaks["kept"] = kept.ask("peak")
    except SystemExit:  # its error, of a network that writes over its activations, was printed
        peaks["kept"] = None
    kept.close()
    return Figures(seconds, peaks)


def time_row(name: str, figures: Figures) -> str:
    seconds = figures.seconds
    medians = [f"{statistics.median(seconds[kind]):.2f}" for kind in TIMED]
    ratio = statistics.median(a / b for a, b in zip(seconds["ours"], seconds["node"], strict=True))
    return f"| {' | '.join([name, *medians])} | **{ratio:.2f}** |"


def memory_row(name: str, figures: Figures) -> str:
    ours, node, blocks, kept = (figures.peaks[kind] for kind in (*TIMED, "kept"))
    assert ours and node and blocks
    sizes = ["no gradient" if size is None else f"{size / 1e6:.0f}" for size in (ours, node, blocks, kept)]
    return f"| {' | '.join([name, *sizes])} | **{ours / node:.2f}** |"


def report(measured: dict[str, Figures], options: argparse.Namespace) -> str:
    versions = subprocess.run(
        [PROGRAMS / "python", "-c", "import torch, comfyui_version as c; print(torch.__version__, c.__version__)"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    torch_version, host_version = versions.stdout.split()
    lines = [
        "# A step on ComfyUI's models, beside a step of its own TrainLoraNode",
        "",
        f"Small models of random weights, two pictures a step, rank {options.rank}, float32, on {platform.system()} "
        f"{platform.machine()}, {os.cpu_count()} CPU cores, torch {torch_version}, ComfyUI {host_version}; "
        f"{options.steps} steps in turns.",
        "",
        "| median seconds a step | ours | node | blocks | ours / node |",
        "|---|---|---|---|---|",
        *(time_row(name, figures) for name, figures in measured.items()),
        "",
        "| peak of a step, MB | ours | node | blocks | kept | ours / node |",
        "|---|---|---|---|---|---|",
        *(memory_row(name, figures) for name, figures in measured.items()),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
