"""The command line: `tcd-train COMMAND ...`."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from .commands import COMMANDS, LASTING
from .errors import RunError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 2 for bad input, 1 for a run that failed, 130 when interrupted."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        code: int = options.execute(options)
        return code
    except UserError as error:
        return _fail(str(error), 2)
    except (RunError, OSError) as error:  # an OSError says which file, and that the disk is full
        return _fail(str(error), 1)
    except KeyboardInterrupt as error:
        kept = "; the same command goes on from what is saved" if options.command in LASTING else ""
        return _fail(str(error) or f"interrupted{kept}", 130)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What the arguments say; flags may stand before, between and behind the others."""
    parser = argparse.ArgumentParser(prog="tcd-train", description="Distill a diffusion model into a TCD LoRA.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"{__package__}.commands.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(execute=module.execute, command=name)
    if not arguments or arguments[0] not in COMMANDS:
        return parser.parse_args(arguments)
    command = commands.choices[arguments[0]]  # by itself, since a parser of commands does not let flags mix with lists
    options, others = command.parse_known_intermixed_args(arguments[1:])
    if others:
        flags = [text for text in others if text.startswith("-")]
        command.error(f"unrecognized arguments: {' '.join(flags or others)}")
    return options


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
