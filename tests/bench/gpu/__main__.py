"""Benchmark of the trainer and the nodes on a GPU, in at most eight minutes.

python tests/bench/gpu --out FILE.json [--minutes N] [--dry] [PART...]

Models have their full size and random weights, so nothing is downloaded. Each figure is written as soon as it is there,
so a run that is cut off keeps what it has. What no time is left for is named as skipped. --dry: tiny sizes, on a CPU.
The parts host and nodes need ComfyUI's packages, the others diffusers.
"""

import argparse
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[1] / "host" / "scripts")]

from measure import Bench  # noqa: E402

# In the order in which they run: the shortest answers to the most important questions first.
PARTS = ("unets", "orders", "waits", "gradients", "host", "nodes", "world")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}: use some of {', '.join(PARTS)}")
    bench = Bench(options.out, dry=options.dry, deadline=time.monotonic() + 60 * options.minutes)
    for part in options.parts or PARTS:
        run: Callable[[Bench], None] = import_module(f"part_{part}").run
        with bench.part(part):
            run(bench)


if __name__ == "__main__":
    main()
