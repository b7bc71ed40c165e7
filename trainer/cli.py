"""The command line: `tcd-train COMMAND ...`."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from .commands import COMMANDS, RESUMABLE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 if it failed, 2 for bad input, 130 if interrupted."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    from .errors import RunError, UserError  # not at the top: torch comes with them, and --help must not wait for it

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        code: int = options.execute(options)
        return code
    except UserError as error:
        return _fail(str(error), 2)
    except (RunError, OSError) as error:  # the message of an OSError names the file and the reason
        return _fail(str(error), 1)
    except KeyboardInterrupt as error:
        hint = "; run the same command again to resume from what is saved" if options.command in RESUMABLE else ""
        return _fail(str(error) or f"interrupted{hint}", 130)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; options may come before, between and after the positional arguments."""
    parser = argparse.ArgumentParser(prog="tcd-train", description="Distill a diffusion model into a TCD LoRA.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"{__package__}.commands.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(execute=module.execute, command=name)
    if not arguments or arguments[0] not in COMMANDS:
        return parser.parse_args(arguments)
    # The command's parser is called directly, because argparse cannot intermix arguments through subparsers.
    command = commands.choices[arguments[0]]
    options, unknown = command.parse_known_intermixed_args(arguments[1:])
    if unknown:
        flags = [text for text in unknown if text.startswith("-")]
        command.error(f"unrecognized arguments: {' '.join(flags or unknown)}")
    return options


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
