"""Benchmark of quality: the methods that a LoRA can be distilled by, in two worlds of which everything is known.

python tests/bench/quality --results FOLDER [--worlds checkerboard shapes] [--write]

Each method gets the same number of iterations, and of tries to find its learning rate: one run at each of a few. The
one with the least distance, as a geometric mean over 1, 2, 4 and 8 steps at the gamma of the method's own sampler, is
then run from other seeds too. A run that is in FOLDER already is not done again.
--write puts the tables and plots into docs/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import report
import torch
from runs import WORLDS, compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="a file to each run")
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
