"""`tcd-train report`: write the report of a run, finished or not."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "write report.html for a run, finished or not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the folder."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the output.folder of the run")


def execute(options: argparse.Namespace) -> int:
    """Write the report and print its path."""
    from ..views.report import write_report

    sys.stdout.write(f"wrote {write_report(options.folder)}\n")
    return 0
