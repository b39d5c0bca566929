"""fcntl_locking(2), F_OFD_GETLK: does anybody hold a lock on a range of bytes."""

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
    """The first lock that somebody holds in the range asked about.

    length_bytes is 0 when it reaches to the end of the file; pid is -1 for a lock that belongs
    to an open file description, as qemu's do.
    """

    kind: Kind
    start_byte: int
    length_bytes: int
    pid: int


def find_lock(descriptor: int, first_byte: int, last_byte: int) -> Lock | None:
    """Give the first read or write lock that others hold on any byte from first to last.

    A lock that was taken through this same open file description is not seen.

    Raises:
        OSError: EBADF, the descriptor is O_PATH or not open.
    """
    question = struct.pack(
        _FLOCK, fcntl.F_WRLCK, os.SEEK_SET, first_byte, last_byte - first_byte + 1, 0
    )
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, question)
    kind, _, start, length, pid = struct.unpack(_FLOCK, answer)
    if kind == fcntl.F_UNLCK:
        return None
    return Lock(kind=Kind(kind), start_byte=start, length_bytes=length, pid=pid)


def is_locked(descriptor: int, first_byte: int, last_byte: int) -> bool:
    """Tell whether somebody else holds any lock on any byte from first to last.

    Raises:
        OSError: EBADF, the descriptor is O_PATH or not open.
    """
    return find_lock(descriptor, first_byte, last_byte) is not None
