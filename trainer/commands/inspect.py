"""`tcd-train inspect`: describe a LoRA file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "describe the content of a LoRA file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the file."""
    parser.add_argument("file", type=Path, metavar="FILE.safetensors")


def execute(options: argparse.Namespace) -> int:
    """Print the description."""
    from ..files.describe_file import describe_file

    sys.stdout.write(f"{describe_file(options.file)}\n")
    return 0
