"""Numbers of bytes as readable text."""

from __future__ import annotations

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def format_bytes(amount: int) -> str:
    """Format a number of bytes with up to three significant digits and a binary unit, such as "1.50 GiB"."""
    power = min((max(amount, 1).bit_length() - 1) // 10, len(_UNITS) - 1)
    value = amount / 2 ** (10 * power)
    digits = 0 if power == 0 or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {_UNITS[power]}"
