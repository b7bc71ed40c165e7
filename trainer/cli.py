"""The command line: `tcd-train COMMAND ...`."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from trainer.commands import COMMANDS
from trainer.errors import RunError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 2 for bad input, 1 for a run that failed, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        code: int = options.execute(options)
        return code
    except UserError as error:
        return _fail(str(error), 2)
    except (RunError, OSError) as error:  # an OSError says which file, and that the disk is full
        return _fail(str(error), 1)
    except KeyboardInterrupt as error:
        return _fail(str(error) or "interrupted; no LoRA was written", 130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tcd-train", description="Distill a diffusion model into a TCD LoRA.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"trainer.commands.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(execute=module.execute)
    return parser


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
