"""`tcd-train run`: distill as a configuration says."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import recipes

if TYPE_CHECKING:
    from ..config.settings import Config

HELP = "distill as a configuration file says"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the configuration, its overrides, and the dry run."""
    add_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, and stop")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Declare what `resolve` reads."""
    parser.add_argument(
        "config", type=Path, metavar="CONFIG.toml", help=f"a file, or a recipe: {', '.join(recipes.names())}"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="take precedence over the file"
    )


def resolve(options: argparse.Namespace) -> Config:
    """The configuration that the arguments of `add_config` mean."""
    from ..config.settings import load

    return load(recipes.find(options.config), options.overrides)


def execute(options: argparse.Namespace) -> int:
    """Run, or say what a run would do."""
    resolved = resolve(options)

    from ..preflight import check, check_inputs, is_finished, plan
    from ..run import run

    if options.dry_run:
        done = is_finished(resolved)
        inputs = check_inputs(resolved) if done else check(resolved)
        sys.stdout.write(f"{resolved.to_toml()}\n{plan(resolved, inputs)}\n")
        if done:
            sys.stdout.write("          which is there: the run is done\n")
    else:
        run(resolved)
    return 0
