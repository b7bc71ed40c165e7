"""`tcd-train inspect`: say what a LoRA file holds."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "say what a LoRA file holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the file."""
    parser.add_argument("file", type=Path, metavar="FILE.safetensors")


def execute(options: argparse.Namespace) -> int:
    """Print the description."""
    from ..files.describe_file import describe_file

    sys.stdout.write(f"{describe_file(options.file)}\n")
    return 0
