"""fcntl_locking(2), F_OFD_GETLK: query record locks on a range of bytes."""

import enum
import fcntl
import os
import struct
from dataclasses import dataclass
from typing import Final

_FLOCK: Final = "hhqqi4x"  # struct flock with a 64-bit off_t


class Kind(enum.IntEnum):
    """How a range is locked."""

    READ = fcntl.F_RDLCK
    WRITE = fcntl.F_WRLCK


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """A conflicting lock.

    length_bytes is 0 when it reaches to the end of the file; pid is -1 for a lock of an open file
    description, as qemu's are.
    """

    kind: Kind
    start_byte: int
    length_bytes: int
    pid: int


def find_lock(descriptor: int, first_byte: int, last_byte: int) -> Lock | None:
    """Return the first read or write lock that others hold on any byte from first to last.

    Locks of this same open file description are not reported.

    Raises:
        OSError: EBADF, the descriptor is O_PATH or not open.
    """
    query = struct.pack(
        _FLOCK, fcntl.F_WRLCK, os.SEEK_SET, first_byte, last_byte - first_byte + 1, 0
    )
    found = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, query)
    kind, _, start, length, pid = struct.unpack(_FLOCK, found)
    if kind == fcntl.F_UNLCK:
        return None
    return Lock(kind=Kind(kind), start_byte=start, length_bytes=length, pid=pid)


def is_locked(descriptor: int, first_byte: int, last_byte: int) -> bool:
    """Whether others hold a lock on any byte from first to last.

    Raises:
        OSError: EBADF, the descriptor is O_PATH or not open.
    """
    return find_lock(descriptor, first_byte, last_byte) is not None
