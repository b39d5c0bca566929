"""sync_file_range(2): have dirty pages written, without the metadata that leads to them."""

import ctypes
import os
from typing import Final

_sync_file_range: Final = ctypes.CDLL(None, use_errno=True).sync_file_range

# Source: linux/fs.h.
_WAIT_BEFORE: Final = 1
_WRITE: Final = 2
_WAIT_AFTER: Final = 4


def begin_write(fd: int) -> None:
    """Have all dirty pages of a file written, without waiting for the disk.

    It may block where the queue to the disk is full. An error that was met is reported to fsync(2)
    as ever. Source: sync_file_range(2).

    Raises:
        OSError: EIO, ENOSPC, EDQUOT: some could not be sent to the disk.
    """
    _call(fd, _WRITE)


def write_and_wait(fd: int) -> None:
    """Write all dirty pages of a file, and wait until the disk has taken them.

    This is not durable: fsync(2) is. An error that is reported here is not reported to fsync(2) of
    the same open file description once more. Source: sync_file_range(2), Linux errseq_t.

    Raises:
        OSError: EIO, ENOSPC, EDQUOT: some could not be written.
    """
    _call(fd, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)


def _call(fd: int, flags: int) -> None:
    start, to_the_end = ctypes.c_int64(0), ctypes.c_int64(0)
    if _sync_file_range(fd, start, to_the_end, ctypes.c_uint(flags)) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"sync_file_range: {os.strerror(error)}")
