"""Format values for people. Text chosen by others reaches the terminal only escaped."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from typing import Final

_MINUTE: Final = 60

_LOWEST_BYTE: Final = 0xDC00
"""Python maps a byte of a name that is not UTF-8 to this plus the byte. Source: PEP 383."""

_BYTES: Final = range(0x80, 0x100)

_MOST_SHOWN: Final = 1000
"""From here on the next larger unit is used: three digits suffice."""

_UNITS: Final = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def shown(text: str) -> str:
    """Escape all characters that are invisible or that a terminal may interpret.

    A file name may hold any byte: control sequences, line ends, marks that reverse the direction.
    """
    return "".join(item if item.isprintable() else _escaped(item) for item in text)


def _escaped(character: str) -> str:
    byte = ord(character) - _LOWEST_BYTE
    if byte in _BYTES:
        return f"\\x{byte:02x}"
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def size(count: float) -> str:
    """A number of bytes, to three digits."""
    unit = 0
    while count >= _MOST_SHOWN and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.{_decimals(count) if unit else 0}f} {_UNITS[unit]}"


def rate(bytes_per_second: float) -> str:
    """A speed."""
    return f"{size(bytes_per_second)}/s"


def duration(seconds: float) -> str:
    """A time span."""
    minutes, rest = divmod(round(seconds), _MINUTE)
    hours, minutes = divmod(minutes, _MINUTE)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.{_decimals(seconds)}f} s"


def _decimals(number: float) -> int:
    """How many decimals give a number three digits."""
    return max(2 - int(math.log10(max(number, 1))), 0)


def moment(time: datetime.datetime | None) -> str:
    """A point in time, in the reader's own zone."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S") if time else "-"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Align rows of cells in columns. The first row has the headings."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
