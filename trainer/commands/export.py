"""`tcd-train export`: write a LoRA with different tensor names or dtype, or merge it into a checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "write a LoRA with kohya's or PEFT's tensor names, in a different dtype, or merged into a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the file to read, the file to write, and the format of the latter."""
    parser.add_argument("file", type=Path, metavar="LORA.safetensors")
    parser.add_argument("target", type=Path, metavar="NEW.safetensors", help="the file to write, which must not exist")
    parser.add_argument(
        "--names",
        choices=("kohya", "peft"),
        default="kohya",
        help="tensor names (default: kohya, which ComfyUI and diffusers read)",
    )
    parser.add_argument(
        "--without-target-time",
        action="store_true",
        help="leave the embedding of the target time out: diffusers refuses a file with it, and PEFT's names and a "
        "checkpoint have no place for it",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="dtype of the weights (default: float16; with --into, that of the checkpoint)",
    )
    parser.add_argument(
        "--into", type=Path, metavar="CHECKPOINT", help="write this checkpoint with the LoRA merged into it"
    )
    parser.add_argument("--strength", type=float, default=1.0, help="strength of the merged LoRA (default: 1)")


def execute(options: argparse.Namespace) -> int:
    """Write the file and print its path."""
    import torch

    from ..files.convert import convert
    from ..files.merge import merge

    dtype = getattr(torch, options.dtype) if options.dtype else None
    if options.into:
        merge(
            options.file,
            options.into,
            options.target,
            strength=options.strength,
            dtype=dtype,
            without_target_time=options.without_target_time,
        )
    else:
        convert(
            options.file,
            options.target,
            naming=options.names,
            dtype=dtype or torch.float16,
            without_target_time=options.without_target_time,
        )
    sys.stdout.write(f"wrote {options.target}\n")
    return 0
