"""Numbers of bytes as a person reads them."""

from __future__ import annotations

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def readable(amount: int) -> str:
    """Say a number of bytes to three digits or so, in the largest unit of which there is at least one."""
    power = min((max(amount, 1).bit_length() - 1) // 10, len(_UNITS) - 1)
    value = amount / 2 ** (10 * power)
    digits = 0 if power == 0 or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {_UNITS[power]}"
