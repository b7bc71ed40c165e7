"""A step of the trainer beside the order of work of diffusers' LCM-LoRA script, on the same network, in turns."""

from __future__ import annotations

import statistics

from bases import config_of, random_base, sd15_of, side_of
from distill_loops import Ours, Separate
from measure import Bench, Timed

from plain_method import PLAIN

BATCH, TURNS = 4, 5


def run(bench: Bench) -> None:
    """Time both loops in turns, a few steps at a time; each is measured alone in memory."""
    side = side_of(bench, 512)
    with bench.case("ours and separate") as has_time:
        if not has_time:
            return
        times: dict[str, list[Timed]] = {"ours": [], "separate": []}
        for _ in range(1 if bench.dry else TURNS):
            for name, loop in {"ours": Ours, "separate": Separate}.items():
                config = config_of(side, BATCH, method=PLAIN, device=str(bench.device))
                checkpoint = random_base(sd15_of(bench), bench.device)
                step = loop(config, bench.device, bench.dtype, checkpoint).step
                times[name].append(bench.time(step, 1 if bench.dry else 4))
        medians = {name: statistics.median(timed.seconds for timed in each) for name, each in times.items()}
        peaks = {name: max(timed.peak for timed in each) for name, each in times.items()}
        for name in times:
            bench.keep(
                f"{sd15_of(bench)} {side} px batch {BATCH}, {name}",
                {"ms a step": round(1e3 * medians[name], 2), "peak GB": round(peaks[name] / 1e9, 3)},
            )
        bench.keep("ours / separate, time", round(medians["ours"] / medians["separate"], 3))
        if peaks["separate"]:
            bench.keep("ours / separate, memory", round(peaks["ours"] / peaks["separate"], 3))
