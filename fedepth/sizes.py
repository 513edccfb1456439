"""Sizes for people: "300MiB" in, "34.1 MiB" out."""

from __future__ import annotations

import re

from fedepth.errors import ConfigError
from fedepth.printable import shortened

MOST_BYTES = 1 << 60

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
_BINARY = {10: "KiB", 20: "MiB", 30: "GiB", 40: "TiB"}
_SIZE = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([a-z]*)", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Bytes in `text`: a whole number of bytes, or a number with a unit, as "300MiB", "1.5 GiB", "300 MB".

    Units count by their standards (IEC 80000-13): MiB is 1024², MB is 1000². Case does not matter.

    Raises:
        ConfigError: not a size, negative, beyond MOST_BYTES, or an unknown unit such as "M", which could mean either.
    """
    shown = shortened(str(text))
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise ConfigError(f'"{shown}" is not a size: write bytes, or a number and a unit such as "300MiB"')
    number, unit = match.groups()
    if unit.lower() not in _UNITS:
        raise ConfigError(
            f'"{shown}" is not a size: unknown unit "{shortened(unit)}", '
            "known are B, KiB, MiB, GiB, TiB, KB, MB, GB, TB"
        )
    # Out of floating point, so that a large number of bytes is exact.
    whole, _, decimals = number.partition(".")
    size = _rounded(int(whole + decimals) * _UNITS[unit.lower()], 10 ** len(decimals))
    if size > MOST_BYTES:
        raise ConfigError(f'"{shown}" is more memory than any machine has; write at most {format_size(MOST_BYTES)}')
    return size


def format_size(size_bytes: int, *, round_up: bool = False) -> str:
    """`size_bytes` in the largest binary unit that leaves at least 1: "34.1 MiB", "-2.0 KiB", "512 B".

    Args:
        round_up: never print less than `size_bytes`: for a size that somebody has to provide.
    """
    size = abs(size_bytes)
    sign = "-" if size_bytes < 0 else ""
    if size < 1 << 10:
        return f"{sign}{size} B"

    def tenths(exponent: int) -> int:
        unit = 1 << exponent
        return -(-10 * size // unit) if round_up else _rounded(10 * size, unit)

    # What would be printed as 1024.0 belongs to the next unit.
    exponent = next((each for each in (10, 20, 30) if tenths(each) < 10_240), 40)
    whole, tenth = divmod(tenths(exponent), 10)
    return f"{sign}{whole}.{tenth} {_BINARY[exponent]}"


def _rounded(dividend: int, divisor: int) -> int:
    """Their quotient to the nearest integer, a half to the even one: without fractions, which no idle agent loads."""
    quotient, rest = divmod(dividend, divisor)
    return quotient + (2 * rest > divisor or (2 * rest == divisor and quotient % 2))
