"""`tcd-train cache`: encode the pictures and captions of a configuration in advance of a run."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ..errors import UserError
from .run import add_config, load_config

if TYPE_CHECKING:
    from ..config.settings import Config
    from ..data.survey import Survey

HELP = "encode pictures and captions into the cache, and check the files that are in it"


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
    """Examine the data, encode what is not cached, verify what is, and print a report."""
    config = load_config(options)
    part, parts = _part(options.part)

    from ..config.device import device_and_dtype
    from ..data.cache import merge_parts, open_cached
    from ..data.encode import fill_cache
    from ..data.survey import survey

    device, dtype = device_and_dtype(config)
    merge_parts(config, dtype)
    cached = open_cached(config, dtype)
    found = cached.survey if cached else None
    if found is None and not config.data.skip_bad:  # otherwise unusable files are found while encoding
        found = survey(config, part, parts)
    if found:
        _report(config, found)
    fill_cache(config, device, dtype, part=part, parts=parts, total=found.seen if found else None, verify=True)
    cached = open_cached(config, dtype)
    if cached and not found:
        _report(config, cached.survey)
    sys.stdout.write(f"{'the data are' if cached else f'part {part} of {parts} is'} cached in {config.cache_folder}\n")
    return 0


def _report(config: Config, found: Survey) -> None:
    from ..data.survey import bucket_table, data_report

    sys.stdout.write(f"{data_report(found, config)}\n\n{bucket_table(found, config, config.training.batch)}\n\n")


def _part(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise UserError(f"--part is {text!r}: write K/N with K from 0 to N - 1, such as 0/8")
    return int(part), int(parts)
