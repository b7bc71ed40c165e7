"""`tcd-train sample`: draw pictures with a LoRA, as the ComfyUI nodes would."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config.base import BaseConfig

HELP = "draw pictures with a LoRA, as the ComfyUI nodes would"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the LoRA file, its base, and the pictures to draw."""
    parser.add_argument("file", type=Path, metavar="LORA.safetensors")
    parser.add_argument("--prompt", action="append", default=[], help="prompt to draw; may be given several times")
    parser.add_argument(
        "--out", type=Path, default=Path("samples"), metavar="FOLDER", help="folder for the pictures (default: samples)"
    )
    parser.add_argument(
        "--base", metavar="CHECKPOINT", help="base model (default: the base in the config.toml beside the LoRA)"
    )
    parser.add_argument("--vae", help="VAE to use instead of the base's own")
    parser.add_argument("--prediction", choices=("auto", "eps", "v"), help="what the base predicts, epsilon or v")
    parser.add_argument("--zero-snr", choices=("auto", "yes", "no"), help="whether its noise schedule ends at zero SNR")
    parser.add_argument("--clip-skip", type=int, metavar="N", help="layer of the text encoder, from the last")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="dtype of the base's weights"
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0], metavar="SEED", help="default: 0")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        metavar="N",
        help="numbers of sampling steps (default: recommended by the LoRA, or 4)",
    )
    parser.add_argument("--eta", type=float, help="eta, the paper's gamma (default: recommended by the LoRA, or 0.3)")
    parser.add_argument("--cfg", type=float, help="guidance scale (default: recommended by the LoRA, or 1)")
    for side in ("--width", "--height"):
        parser.add_argument(side, type=int, default=0, help="in pixels (default: as the LoRA was trained, or the base)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps ...")


def execute(options: argparse.Namespace) -> int:
    """Draw the pictures and print the path of their grid."""
    from ...tcd.lora_metadata import (
        CFG_KEY,
        DEFAULT_CFG,
        DEFAULT_ETA,
        DEFAULT_STEPS,
        ETA_KEY,
        RESOLUTION_KEY,
        STEPS_KEY,
    )
    from ..config.device import resolve_device
    from ..config.schema import build
    from ..config.settings import PreviewConfig
    from ..lora_file import read_lora
    from ..views.gallery import draw_gallery

    lora = read_lora(options.file)
    metadata = lora.metadata
    if for_text := len(lora.modules) - len(lora.network_modules):
        logging.getLogger("trajectory-consistency").warning(
            "%s has %d modules for a text encoder, which are left out here, as by TCDLoraLoader", options.file, for_text
        )
    base = _base(options)
    side = 0 if options.width and options.height else _recommended(metadata, RESOLUTION_KEY, 0, "--width and --height")
    settings = build(
        PreviewConfig,
        {
            "prompts": options.prompt,
            "seeds": options.seed,
            "steps": options.steps or [_recommended(metadata, STEPS_KEY, DEFAULT_STEPS)],
            "eta": _recommended(metadata, ETA_KEY, DEFAULT_ETA) if options.eta is None else options.eta,
            "cfg": _recommended(metadata, CFG_KEY, DEFAULT_CFG) if options.cfg is None else options.cfg,
            "width": options.width or side,
            "height": options.height or side,
        },
    )
    grid = draw_gallery(options.file, base, settings, options.out, resolve_device(options.device))
    sys.stdout.write(f"look at {grid}\n")
    return 0


def _base(options: argparse.Namespace) -> BaseConfig:
    """Return the base named by --base, or else the base in the config.toml beside the LoRA."""
    from ..config.base import BaseConfig
    from ..config.settings import FILE_NAME, load
    from ..errors import UserError

    given = {
        key: getattr(options, key)
        for key in ("vae", "prediction", "zero_snr", "clip_skip", "dtype")
        if getattr(options, key)
    }
    if options.base:
        return BaseConfig(path=options.base, **given)
    config_path = options.file.with_name(FILE_NAME)
    if not config_path.is_file():
        raise UserError(f"there is no {config_path} to name the base of {options.file.name}: use --base")
    return replace(load(config_path).base, **given)


def _recommended(metadata: Mapping[str, str], key: str, default: float, option: str = "") -> float:
    """Return the value of a metadata key such as tcd.eta, converted to the default's type; the default if it is absent.

    option: of the command, in place of the key's name. Raises UserError if the value is not a number of that type.
    """
    from ..errors import UserError

    text = metadata.get(key, default)
    try:
        return type(default)(text)
    except ValueError:
        number = "a whole number" if isinstance(default, int) else "a number"
        option = option or f"--{key.removeprefix('tcd.')}"
        raise UserError(f"{key} in the metadata is {text!r}, but must be {number}: give {option}") from None
