"""`tcd-train check`: look at everything that a run needs, and say what it would be like."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ..config.settings import Config
from .run import add_config, resolve

if TYPE_CHECKING:
    import torch

    from ..models.unet.families import Family

HELP = "say what a run would do, read and need, before it does"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the configuration and its overrides."""
    add_config(parser)


def execute(options: argparse.Namespace) -> int:
    """Print the plan, the data report, the bucket table, the LoRA's keys and the memory; write nothing."""
    config = resolve(options)

    from ..config.device import placed
    from ..data.survey import bucket_table, data_report
    from ..files.lora_keys import describe_keys
    from ..run import check, look, plan, taken

    why = taken(config)
    inputs = look(config) if why else check(config)
    _, dtype = placed(config)
    sections = [
        plan(config, inputs) + (f"\n          not free for a new run: {why}" if why else ""),
        data_report(inputs.found, config),
        bucket_table(inputs.found, config, config.training.batch),
        describe_keys(inputs.base.family, config.adapter.rank, config.adapter.targets),
        _memory(config, inputs.base.family, dtype),
    ]
    sys.stdout.write("\n\n".join(sections) + "\n")
    return 0


def _memory(config: Config, family: Family, dtype: torch.dtype) -> str:
    """What a run takes, in words."""
    from ..training.memory import Settings, estimate

    memory = estimate(Settings.of(config, family, dtype))
    return f"memory    about {memory}\n          of each process; on a GPU, CUDA itself takes about half a GiB more"
