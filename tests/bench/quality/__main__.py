"""Benchmark of quality: compare distillation methods in two worlds whose data are known exactly.

python tests/bench/quality --results FOLDER [--worlds checkerboard shapes] [--write]

Each method gets the same number of iterations, and is first run with the same number of learning rates. The learning
rate with the smallest distance is then run with other seeds too; the distance is a geometric mean over 1, 2, 4 and 8
steps with the gamma of the method's own sampler. Runs whose results are in FOLDER are not repeated.
--write writes the tables and plots into docs/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import report
import torch
from runs import WORLDS, compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder with one file for each run")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--write", action="store_true", help="write docs/quality.md and its plots")
    options = parser.parse_args()
    torch.set_num_threads(1)  # networks this small are slower on two
    found = {name: compare(name, options.results / name) for name in options.worlds}
    if options.write:
        report.write(found, options.results)
    else:
        print(report.page(found))


if __name__ == "__main__":
    main()
