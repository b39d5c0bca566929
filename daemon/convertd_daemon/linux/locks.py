"""fcntl_locking(2), F_OFD_GETLK, F_OFD_SETLK: record locks on a range of bytes."""

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
    query = _range(fcntl.F_WRLCK, first_byte, last_byte)
    kind, *_ = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, query))
    return bool(kind != fcntl.F_UNLCK)


def lock_for_reading(descriptor: int, first_byte: int, last_byte: int) -> None:
    """Read-lock a range, for this open file description, until its last descriptor is closed.

    Raises:
        OSError: EAGAIN, another has a write lock on a part of it; EBADF, the descriptor is not open
            for reading; ENOLCK, EOPNOTSUPP, the file system has no locks.
    """
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _range(fcntl.F_RDLCK, first_byte, last_byte))


def unlock(descriptor: int, first_byte: int, last_byte: int) -> None:
    """Give up all locks of this open file description on a range.

    Raises:
        OSError: EBADF, the descriptor is not open.
    """
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _range(fcntl.F_UNLCK, first_byte, last_byte))


def _range(kind: int, first_byte: int, last_byte: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, first_byte, last_byte - first_byte + 1, 0)
