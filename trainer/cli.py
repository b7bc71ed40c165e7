"""The command line: `tcd-train run CONFIG.toml [section.key=value ...]`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 2 for bad input, 1 for a run that failed, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return _run(options)
    except UserError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted; no LoRA was written", 130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tcd-train", description="Distill a diffusion model into a TCD LoRA.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="distill as a configuration file says")
    run.add_argument("config", type=Path, metavar="CONFIG.toml")
    run.add_argument("overrides", nargs="*", metavar="section.key=value", help="take precedence over the file")
    run.add_argument("--dry-run", action="store_true", help="check everything, print the plan, and stop")
    return parser


def _run(options: argparse.Namespace) -> int:
    # Imported here, so that `--help` and a typo in the configuration do not wait for the model libraries.
    from trainer import config

    resolved = config.load(options.config, options.overrides)

    from trainer.export import ExportError
    from trainer.loop import NonFiniteError
    from trainer.run import check, plan, run

    if options.dry_run:
        sys.stdout.write(f"{resolved.to_toml()}\n{plan(resolved, check(resolved))}\n")
        return 0
    try:
        run(resolved)
    except (ExportError, NonFiniteError, OSError) as error:  # an OSError says which file, and that the disk is full
        return _fail(str(error), 1)
    return 0


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
