"""`tcd-train check`: look at everything that a run needs, and say what it would be like."""

from __future__ import annotations

import argparse
import sys

from trainer.commands.run import add_config, resolve

HELP = "say what a run would do, read and need, before it does"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the configuration and its overrides."""
    add_config(parser)


def execute(options: argparse.Namespace) -> int:
    """Print the plan, the data report, the bucket table, the LoRA's keys and the memory; write nothing."""
    config = resolve(options)

    from trainer.lora_keys import describe_keys
    from trainer.memory import Settings, estimate
    from trainer.placement import placed
    from trainer.run import check, plan
    from trainer.survey import bucket_table, data_report

    inputs = check(config)
    _, dtype = placed(config)
    memory = estimate(Settings.of(config, inputs.base.family, dtype))
    sections = [
        plan(config, inputs),
        data_report(inputs.found, config),
        bucket_table(inputs.found, config, config.training.batch),
        describe_keys(inputs.base.family, config.adapter.rank, config.adapter.targets),
        f"memory    about {memory}\n          of each process; on a GPU, CUDA itself takes about half a GiB more",
    ]
    sys.stdout.write("\n\n".join(sections) + "\n")
    return 0
