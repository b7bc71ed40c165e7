"""`tcd-train cache`: encode the pictures and captions of a configuration into the cache, before a run."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .run import add_config, load_config

if TYPE_CHECKING:
    from ..config.settings import Config
    from ..data.survey import Survey

HELP = "encode pictures and captions into the cache, and check its files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the configuration, its overrides, and the part to encode."""
    add_config(parser)
    parser.add_argument(
        "--part",
        default="0/1",
        metavar="K/N",
        help="encode every N-th file, from the K-th on (K from 0), to divide the work among N processes",
    )


def execute(options: argparse.Namespace) -> int:
    """Examine the data, check the cached files, encode missing rows, and print a report."""
    config = load_config(options)
    part, parts = _parse_part(options.part)

    from ..config.device import device_and_dtype
    from ..data.cache import merge_parts, open_cached
    from ..data.encode import fill_cache
    from ..data.survey import survey

    device, dtype = device_and_dtype(config)
    merge_parts(config, dtype)
    cached = open_cached(config, dtype)
    data = cached.survey if cached else None
    if data is None and not config.data.skip_bad:  # otherwise unusable files are found while encoding
        data = survey(config, part, parts)
    if data:
        _print_report(config, data)
    fill_cache(config, device, dtype, part=part, parts=parts, total=data.seen if data else None, verify=True)
    cached = open_cached(config, dtype)
    if cached and not data:
        _print_report(config, cached.survey)
    sys.stdout.write(f"{'the data are' if cached else f'part {part} of {parts} is'} cached in {config.cache_folder}\n")
    return 0


def _print_report(config: Config, data: Survey) -> None:
    from ..data.survey import bucket_table, data_report

    sys.stdout.write(f"{data_report(data, config)}\n\n{bucket_table(data, config, config.training.batch)}\n\n")


def _parse_part(text: str) -> tuple[int, int]:
    from ..errors import UserError

    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise UserError(f"--part is {text!r}: write K/N with K from 0 to N - 1, such as 0/8")
    return int(part), int(parts)
