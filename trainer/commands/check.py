"""`tcd-train check`: examine all inputs of a run and describe the run, without starting it."""

from __future__ import annotations

import argparse
import sys

from .run import add_config, load_config

HELP = "check all inputs of a run, and describe the run and the memory it needs, without starting it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the configuration and its overrides."""
    add_config(parser)


def execute(options: argparse.Namespace) -> int:
    """Print the plan, data report, bucket table, LoRA keys and memory estimate; write nothing."""
    config = load_config(options)

    from ..config.device import device_and_dtype
    from ..data.captions import long_captions
    from ..data.survey import bucket_table, data_report
    from ..files.describe_keys import describe_keys
    from ..preflight import check, check_inputs, output_conflict, plan
    from ..training.memory import MemorySettings, choose_accumulate, estimate_memory

    conflict = output_conflict(config)
    inputs = check_inputs(config) if conflict else check(config)
    device, dtype = device_and_dtype(config)
    config = config.with_accumulate(choose_accumulate(config, inputs.checkpoint, device, dtype))
    memory = estimate_memory(inputs.checkpoint, MemorySettings.from_config(config, dtype))
    long = long_captions(config.data, inputs.checkpoint)
    sections = [
        plan(config, inputs) + (f"\n          not free for a new run: {conflict}" if conflict else ""),
        data_report(inputs.data, config)
        + (f"\n{long:>9} captions  longer than the text encoder takes at once, encoded in chunks" if long else ""),
        bucket_table(inputs.data, config, config.training.batch),
        describe_keys(inputs.checkpoint, config.adapter),
        f"memory    about {memory}\n          of each process; on a GPU, CUDA itself takes about half a GiB more",
    ]
    sys.stdout.write("\n\n".join(sections) + "\n")
    return 0
