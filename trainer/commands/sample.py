"""`tcd-train sample`: draw pictures with a LoRA, as the nodes would."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from ..config.settings import BaseConfig

HELP = "draw pictures with a LoRA, as the nodes would"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the file, its base, and what to draw."""
    parser.add_argument("file", type=Path, metavar="LORA.safetensors")
    parser.add_argument("--prompt", action="append", default=[], help="what to draw; may be given several times")
    parser.add_argument("--out", type=Path, default=Path("samples"), metavar="FOLDER", help="samples")
    parser.add_argument("--base", metavar="CHECKPOINT", help="that of the config.toml beside the LoRA")
    parser.add_argument("--vae", help="instead of the one that the base brings along")
    parser.add_argument("--prediction", choices=("auto", "eps", "v"), help="what the base predicts")
    parser.add_argument("--zero-snr", choices=("auto", "yes", "no"), help="whether its schedule ends without signal")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="of the base's weights")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], metavar="SEED", help="0")
    parser.add_argument("--steps", type=int, nargs="+", metavar="N", help="what the LoRA recommends, or 4")
    parser.add_argument("--eta", type=float, help="gamma; what the LoRA recommends, or 0.3")
    parser.add_argument("--cfg", type=float, help="what the LoRA recommends, or 1")
    parser.add_argument("--width", type=int, default=0, help="in pixels; what the family was trained at")
    parser.add_argument("--height", type=int, default=0, help="in pixels; what the family was trained at")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps ...")


def execute(options: argparse.Namespace) -> int:
    """Draw, and say where the grid is."""
    from ..config.device import resolve_device
    from ..config.schema import build
    from ..config.settings import PreviewConfig
    from ..files.lora_file import read_lora
    from ..views.gallery import draw_gallery

    metadata = read_lora(options.file).metadata
    base = _base(options)
    wanted = build(
        PreviewConfig,
        {
            "prompts": options.prompt,
            "seeds": options.seed,
            "steps": options.steps or [_recommended(metadata, "steps", 4)],
            "eta": _recommended(metadata, "eta", 0.3) if options.eta is None else options.eta,
            "cfg": _recommended(metadata, "cfg", 1.0) if options.cfg is None else options.cfg,
            "width": options.width,
            "height": options.height,
        },
    )
    grid = draw_gallery(options.file, base, wanted, options.out, resolve_device(options.device))
    sys.stdout.write(f"look at {grid}\n")
    return 0


def _base(options: argparse.Namespace) -> BaseConfig:
    """The base that the options name, or else that of the run which made the LoRA."""
    from ..config.settings import FILE_NAME, BaseConfig, load

    given = {key: getattr(options, key) for key in ("vae", "prediction", "zero_snr", "dtype") if getattr(options, key)}
    if options.base:
        return BaseConfig(path=options.base, **given)
    beside = options.file.with_name(FILE_NAME)
    if not beside.is_file():
        raise UserError(f"there is no {beside} to tell the base of {options.file.name}: name it with --base")
    return replace(load(beside).base, **given)


def _recommended(metadata: Mapping[str, str], key: str, default: float) -> float:
    """What the file's metadata recommend, a number like `default`."""
    text = metadata.get(f"tcd.{key}", default)
    try:
        return type(default)(text)
    except ValueError:
        raise UserError(f"tcd.{key} in the metadata is {text!r}, but must be a number: give --{key}") from None
