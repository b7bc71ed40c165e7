"""`tcd-train check`: look at everything that a run needs, and say what it would be like."""

from __future__ import annotations

import argparse
import sys

from .run import add_config, resolve

HELP = "say what a run would do, read and need, before it does"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the configuration and its overrides."""
    add_config(parser)


def execute(options: argparse.Namespace) -> int:
    """Print the plan, the data report, the bucket table, the LoRA's keys and the memory; write nothing."""
    config = resolve(options)

    from ..config.device import device_and_dtype
    from ..data.survey import bucket_table, data_report
    from ..files.describe_keys import describe_keys
    from ..preflight import check, check_inputs, output_conflict, plan
    from ..training.memory import MemorySettings, estimate_memory

    why = output_conflict(config)
    inputs = check_inputs(config) if why else check(config)
    _, dtype = device_and_dtype(config)
    memory = estimate_memory(inputs.checkpoint, MemorySettings.from_config(config, dtype))
    sections = [
        plan(config, inputs) + (f"\n          not free for a new run: {why}" if why else ""),
        data_report(inputs.found, config),
        bucket_table(inputs.found, config, config.training.batch),
        describe_keys(inputs.checkpoint, config.adapter),
        f"memory    about {memory}\n          of each process; on a GPU, CUDA itself takes about half a GiB more",
    ]
    sys.stdout.write("\n\n".join(sections) + "\n")
    return 0
