"""`tcd-train run`: distill a model according to a configuration file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import recipes

if TYPE_CHECKING:
    from ..config.settings import Config

HELP = "distill a model according to a configuration file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the configuration, its overrides, and the dry run."""
    add_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, and stop")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that `load_config` reads."""
    parser.add_argument(
        "config",
        type=Path,
        metavar="CONFIG.toml",
        help=f"a file, or the name of a recipe: {', '.join(recipes.names())}",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="settings that take precedence over the file",
    )


def load_config(options: argparse.Namespace) -> Config:
    """Load the configuration named by the arguments of `add_config`, with its overrides."""
    from ..config.settings import load

    return load(recipes.find(options.config), options.overrides)


def execute(options: argparse.Namespace) -> int:
    """Run, or with --dry-run print the resolved configuration and the plan."""
    config = load_config(options)

    from ..preflight import check, check_inputs, is_finished, plan
    from ..run import run

    if options.dry_run:
        done = is_finished(config)
        inputs = check_inputs(config) if done else check(config)
        sys.stdout.write(f"{config.to_toml()}\n{plan(config, inputs)}\n")
        if done:
            sys.stdout.write("          which exists already: the run is done\n")
    else:
        run(config)
    return 0
