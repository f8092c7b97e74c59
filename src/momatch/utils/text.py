"""Numbers and errors as short texts."""

from __future__ import annotations

import re
from collections.abc import Sequence


def count_of(n: int, noun: str, plural: str = "") -> str:
    """'1 step', '8 steps'; the plural if it is not just an s more."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {plural or noun + 's'}"


def counts_of(numbers: Sequence[int], noun: str) -> str:
    """'1 step', '8 steps', '1, 2 or 8 steps', '1 to 16 steps'."""
    return count_of(numbers[0], noun) if len(numbers) == 1 else f"{alternatives(numbers)} {noun}s"


def alternatives(numbers: Sequence[int]) -> str:
    """'8', '1, 2 or 8'; '1 to 16' of a row of three or more."""
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last


def format_seconds(seconds: float) -> str:
    """'0.7 s', '45 s', '3.5 min', '5.2 h', '2.1 days': an estimate, so two digits."""
    for limit, size, unit in ((90, 1, "s"), (90 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


def format_bytes(size: int) -> str:
    """'512 B', '1.5 MiB', …: three significant digits."""
    value, units = float(size), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while value >= 1000 and unit != "TiB":
        value, unit = value / 1024, next(units)
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.3g} {unit}"


def bytes_of(text: str) -> int:
    """'80GiB' or '80 GB' → bytes: powers of 1,024 with an i, of 1,000 without.

    Raises:
        ValueError: if it is no such size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([KMGT])(i?)B?", text.strip(), re.IGNORECASE)
    if not found:
        raise ValueError(f"{text!r} is no size such as 80GiB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit.upper()) + 1))


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
