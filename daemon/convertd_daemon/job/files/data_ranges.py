"""Where a file has data, between its holes: the kernel alone knows."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def data_ranges(fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Give each range of data in order: its first byte, and the one after its last.

    On a file system that knows of no holes, all of the file is one. Source: lseek(2).

    Raises:
        OSError: the file system can't tell.
    """
    end = 0
    while end < size_bytes:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            # There is none behind.
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end
