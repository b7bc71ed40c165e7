"""Read thousands of mangled files: `python tests/fuzz [--cases N] [--seed S] [--kind KIND]`.

Every case must return or raise the project's own error with a message, in time, and leave no temporary file behind.
Anything else is printed with its kind and seed, and the exit status is 1.
"""

import argparse
import faulthandler
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from cases import SECONDS, Outcome, limited_memory, quiet, run_case
from kinds import KINDS


def main() -> int:
    """Run the cases, and print the counts of each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case of each kind")
    parser.add_argument("--kind", choices=KINDS, help="only this kind")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [options.kind] if options.kind else list(KINDS)
    total = sum(KINDS[kind][1] for kind in chosen)
    began, faults = time.monotonic(), 0
    with limited_memory(), quiet():
        for kind in chosen:
            started = time.monotonic()
            count = max(round(options.cases * KINDS[kind][1] / total), 1)
            outcomes = [_watched(kind, options.seed + number) for number in range(count)]
            found = Counter(bool(each.fault) for each in outcomes)
            refused = sum(each.refused for each in outcomes)
            _say(
                f"{kind:>24}: {count:>5} cases, {refused:>5} refused, {found[True]:>3} faults, "
                f"{time.monotonic() - started:.0f} s"
            )
            faults += found[True]
    _say(f"{faults} faults, {time.monotonic() - began:.0f} s")
    return 1 if faults else 0


def _watched(kind: str, seed: int) -> Outcome:
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # for code that no signal interrupts
    outcome = run_case(kind, seed)
    faulthandler.cancel_dump_traceback_later()
    if outcome.fault:
        _say(f"--- {kind!r}, seed {seed}: {outcome.fault}")
    return outcome


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n".encode("ascii", "backslashreplace").decode())
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
