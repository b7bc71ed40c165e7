"""`tcd-train check`: look at everything that a run needs, and say what it would be like."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from trainer.commands.run import add_config, resolve
from trainer.config import FILE_NAME, Config
from trainer.errors import UserError
from trainer.sizes import readable

if TYPE_CHECKING:
    import torch

    from trainer.bases import Family
    from trainer.run import Inputs

HELP = "say what a run would do, read and need, before it does"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the configuration and its overrides."""
    add_config(parser)


def execute(options: argparse.Namespace) -> int:
    """Print the plan, the data report, the bucket table, the LoRA's keys and the memory; write nothing."""
    config = resolve(options)

    from trainer.lora_keys import describe_keys
    from trainer.placement import placed
    from trainer.run import plan
    from trainer.survey import bucket_table, data_report

    inputs, taken = _look(config)
    _, dtype = placed(config)
    sections = [
        plan(config, inputs) + (f"\n          not free for a new run: {taken}" if taken else ""),
        data_report(inputs.found, config),
        bucket_table(inputs.found, config, config.training.batch),
        describe_keys(inputs.base.family, config.adapter.rank, config.adapter.targets),
        _memory(config, inputs.base.family, dtype),
    ]
    sys.stdout.write("\n\n".join(sections) + "\n")
    return 0


def _look(config: Config) -> tuple[Inputs, str]:
    """What a run would read, and why its output folder is not free for it; empty when it is.

    Raises UserError for whatever else would stop the run.
    """
    from trainer.run import check

    try:
        return check(config), ""
    except UserError as error:
        if not (config.lora_path.exists() or (config.output_folder / FILE_NAME).exists()):
            raise
        # The same run with its cache, but in a folder that cannot be there, below a file; it raises what else is wrong.
        data = replace(config.data, cache=str(config.cache_folder))
        output = replace(config.output, folder=str(config.lora_path / "elsewhere"))
        return check(replace(config, data=data, output=output)), str(error)


def _memory(config: Config, family: Family, dtype: torch.dtype) -> str:
    """What a step takes, in words."""
    from trainer.memory import Settings, estimate

    noisy = logging.getLogger("diffusers.models.modeling_utils")
    noisy.addFilter(_says_something)
    try:
        memory = estimate(Settings.of(config, family, dtype))
    finally:
        noisy.removeFilter(_says_something)
    parts = {"the frozen UNet": memory.weights, "the adapter and its optimizer": memory.adapter, "a step": memory.step}
    listed = ", ".join(f"{readable(amount)} for {name}" for name, amount in parts.items())
    return (
        f"memory    about {readable(memory.total)}: {listed}\n"
        "          of each process; on a GPU, CUDA itself takes about half a GiB more"
    )


def _says_something(record: logging.LogRecord) -> bool:
    """Leave out what diffusers 0.42 says of every model cast by `to`, also of one with no module to keep in float32."""
    return "should be kept in float32: []" not in record.getMessage()
