"""fcntl_locking(2), F_OFD_GETLK: query record locks on a range of bytes."""

import fcntl
import os
import struct
from typing import Final

_FLOCK: Final = "hhqqi4x"  # struct flock with a 64-bit off_t


def is_locked(descriptor: int, first_byte: int, last_byte: int) -> bool:
    """Whether others hold a read or write lock on any byte from first to last.

    Locks of this same open file description do not count.

    Raises:
        OSError: EBADF, the descriptor is O_PATH or not open.
    """
    length = last_byte - first_byte + 1
    query = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, first_byte, length, 0)
    kind, *_ = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, query))
    return bool(kind != fcntl.F_UNLCK)
