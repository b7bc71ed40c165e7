"""`tcd-train run`: distill as a configuration says."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..config import recipes
from ..config import settings as config

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


def resolve(options: argparse.Namespace) -> config.Config:
    """The configuration that the arguments of `add_config` mean."""
    return config.load(recipes.find(options.config), options.overrides)


def execute(options: argparse.Namespace) -> int:
    """Run, or say what a run would do."""
    resolved = resolve(options)

    from ..run import check, is_finished, look, plan, run

    if options.dry_run:
        done = is_finished(resolved)
        sys.stdout.write(f"{resolved.to_toml()}\n{plan(resolved, look(resolved) if done else check(resolved))}\n")
        if done:
            sys.stdout.write("          which is there: the run is done\n")
    else:
        run(resolved)
    return 0
