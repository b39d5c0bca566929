"""What `qemu-img map --output=json` says, read as it comes. Fails closed.

A list has a line for each stretch of the disk, and may have millions of them: no more than a piece
of it is kept. The qemu-img that prints it may have been taken over by its image, so that nothing is
taken on trust: what is no entry, ends the reading.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

LONGEST_ENTRY_BYTES: Final = 4096
"""No line comes near it."""

MAX_BYTES: Final = 2**63 - 1
"""What off_t holds."""

NO_OFFSET: Final = -1

_STRANGE: Final = (ValueError, TypeError, KeyError, RecursionError)


class NotUnderstoodError(Exception):
    """It is not what a qemu-img prints."""


class Entry(NamedTuple):
    """A stretch of the disk, in bytes.

    `depth` is the member of the chain that has it, 0 for the source itself. `offset` is where its
    data lies in that member's file, NO_OFFSET where no such place exists: in what is compressed or
    encrypted, or has no data. What reads as `zero` may have a place too, that was never written.
    Source: qemu qapi/block-core.json, MapEntry.
    """

    start: int
    length: int
    depth: int
    zero: bool
    data: bool
    offset: int


class Reader:
    """Reads a list piece by piece; each piece may be cut anywhere."""

    def __init__(self) -> None:
        self._cut = b""

    def take(self, data: bytes) -> Iterator[Entry]:
        """Give the entries that are complete with this piece.

        Raises:
            NotUnderstoodError: there is something else in it.
        """
        lines, _, self._cut = (self._cut + data).rpartition(b"\n")
        if len(self._cut) > LONGEST_ENTRY_BYTES:
            raise NotUnderstoodError
        return _entries(lines)

    def end(self) -> Iterator[Entry]:
        """Give the last entries, at the end of the list.

        Raises:
            NotUnderstoodError: there is something else.
        """
        rest, self._cut = self._cut, b""
        return _entries(rest)


def _entries(lines: bytes) -> Iterator[Entry]:
    try:
        # One call for many lines takes a third of the time of one for each.
        for found in json.loads(b"[%b]" % lines.strip(b"[],\r\n ")):
            yield _entry(found)
    except _STRANGE as error:
        raise NotUnderstoodError from error


def _entry(found: dict[str, Any]) -> Entry:
    offset = _number(found["offset"]) if "offset" in found else NO_OFFSET
    return Entry(
        _number(found["start"]),
        _number(found["length"]),
        _number(found["depth"]),
        _flag(found["zero"]),
        _flag(found["data"]),
        offset,
    )


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value <= MAX_BYTES:
        raise ValueError
    return value


def _flag(value: object) -> bool:
    if type(value) is not bool:
        raise TypeError
    return value
