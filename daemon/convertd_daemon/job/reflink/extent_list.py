"""The extents of a disk, in order, in a file of the job's own: there may be millions of them."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Final

from convertd_daemon.job.reflink.extents import Extent

if TYPE_CHECKING:
    from collections.abc import Iterator

_RECORD: Final = struct.Struct("=QQQQ")
"""Start, length, member, and offset in the member's file."""

_RECORDS_AT_ONCE: Final = 2048


class ExtentList:
    """Extents of data, as they are written by `add` and then read, as often as is wanted.

    An extent that goes on where the last one ended, in the disk and in the file, becomes one with
    it. `fd` is of an empty file, open for reading and writing; borrowed.
    """

    def __init__(self, fd: int) -> None:
        self._file = io.BufferedRandom(io.FileIO(fd, "r+", closefd=False))
        self._last: tuple[int, int, int, int] | None = None

    def add(self, start: int, length: int, member: int, offset: int) -> None:
        """Add the next stretch of data.

        Raises:
            OSError: the file can't be written.
        """
        if self._last is not None:
            begin, before, of, at = self._last
            if of == member and (begin + before, at + before) == (start, offset):
                self._last = begin, before + length, member, at
                return
            self._file.write(_RECORD.pack(*self._last))
        self._last = start, length, member, offset

    def end(self) -> None:
        """Write what is left. Nothing is added afterwards.

        Raises:
            OSError: the file can't be written.
        """
        if self._last is not None:
            self._file.write(_RECORD.pack(*self._last))
        self._last = None
        self._file.flush()

    def __iter__(self) -> Iterator[Extent]:
        """Give the extents, in the order of the disk."""
        self._file.seek(0)
        while data := self._file.read(_RECORD.size * _RECORDS_AT_ONCE):
            for start, length, member, offset in _RECORD.iter_unpack(data):
                yield Extent(
                    start_bytes=start, length_bytes=length, member=member, offset_bytes=offset
                )
