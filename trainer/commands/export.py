"""`tcd-train export`: write a LoRA in another spelling or dtype, or a checkpoint that it is merged into."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "write a LoRA under kohya's or PEFT's names, in another dtype, or merged into a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the two files, and in which form the second is."""
    parser.add_argument("file", type=Path, metavar="LORA.safetensors")
    parser.add_argument("target", type=Path, metavar="NEW.safetensors", help="the file to write, which must not exist")
    parser.add_argument("--names", choices=("kohya", "peft"), default="kohya", help="kohya's fit ComfyUI and diffusers")
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="float16, or that of the checkpoint"
    )
    parser.add_argument("--into", type=Path, metavar="CHECKPOINT", help="write this checkpoint with the LoRA in it")
    parser.add_argument("--strength", type=float, default=1.0, help="of the LoRA in the checkpoint")


def execute(options: argparse.Namespace) -> int:
    """Write the file and say so."""
    import torch

    from ..files.convert import convert
    from ..files.merge import merge

    dtype = getattr(torch, options.dtype) if options.dtype else None
    if options.into:
        merge(options.file, options.into, options.target, strength=options.strength, dtype=dtype)
    else:
        convert(options.file, options.target, naming=options.names, dtype=dtype or torch.float16)
    sys.stdout.write(f"wrote {options.target}\n")
    return 0
