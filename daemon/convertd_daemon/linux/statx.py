"""statx(2): size, times and attributes of an inode, and what is said of direct I/O on it."""

import ctypes
import enum
import struct
from dataclasses import dataclass
from typing import Final

from convertd_daemon.linux import syscall

# Source: linux/stat.h, linux/fcntl.h.
_BYTES: Final = 256
_MTIME: Final = 0x40
_SIZE: Final = 0x200
_BTIME: Final = 0x800
_DIOALIGN: Final = 0x2000
_AT_EMPTY_PATH: Final = 0x1000
_AT_STATX_FORCE_SYNC: Final = 0x2000
_MASK: Final = struct.Struct("=I")
_ALIGNMENTS: Final = struct.Struct("=II")
_ALIGNMENTS_AT: Final = 152  # stx_dio_mem_align, stx_dio_offset_align
_SIZE_OF: Final = struct.Struct("=Q")
_SIZE_AT: Final = 40  # stx_size
_TIMESTAMP: Final = struct.Struct("=qI")
_MTIME_AT: Final = 112  # stx_mtime
_BTIME_AT: Final = 80  # stx_btime
_NS_PER_S: Final = 10**9
_ATTRIBUTES: Final = struct.Struct("=Q")
_ATTRIBUTES_AT: Final = 8  # stx_attributes


class Attribute(enum.IntFlag):
    """What chattr(1) may have set. Source: statx(2), linux/stat.h."""

    IMMUTABLE = 0x10
    APPEND = 0x20


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectAlignment:
    """What direct I/O must be aligned to, in bytes, in memory and in the file; 0: there is none."""

    memory: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What tells one content of a file from another: its size, and when it was last written."""

    size_bytes: int
    mtime_ns: int


def content(fd: int) -> Content:
    """Ask for size and modification time, of a network file system's server too.

    fstat(2) may be answered from what this client remembers: of NFS for a minute, of FUSE for as
    long as the file system said. Source: statx(2), AT_STATX_FORCE_SYNC.

    Raises:
        OSError: the kernel's own answer.
    """
    told = ctypes.create_string_buffer(_BYTES)
    syscall.call("statx", fd, b"", _AT_EMPTY_PATH | _AT_STATX_FORCE_SYNC, _MTIME | _SIZE, told)
    (size,) = _SIZE_OF.unpack_from(told, _SIZE_AT)
    seconds, nanoseconds = _TIMESTAMP.unpack_from(told, _MTIME_AT)
    return Content(size_bytes=size, mtime_ns=seconds * _NS_PER_S + nanoseconds)


def direct_alignment(fd: int) -> DirectAlignment | None:
    """Ask what direct I/O on the inode takes; None where kernel or file system do not say.

    Kernels say it since Linux 6.1, of ext4, XFS, f2fs and block devices; btrfs, tmpfs and most
    network file systems do not.

    Raises:
        OSError: the kernel's own answer.
    """
    told = _ask(fd, _DIOALIGN)
    if told is None:
        return None
    memory, offset = _ALIGNMENTS.unpack_from(told, _ALIGNMENTS_AT)
    return DirectAlignment(memory=memory, offset=offset)


def attributes(fd: int) -> Attribute:
    """Ask which attributes the inode has; a file system that has none tells of none.

    Raises:
        OSError: the kernel's own answer.
    """
    told = ctypes.create_string_buffer(_BYTES)
    syscall.call("statx", fd, b"", _AT_EMPTY_PATH, 0, told)
    (found,) = _ATTRIBUTES.unpack_from(told, _ATTRIBUTES_AT)
    return Attribute(found & (Attribute.IMMUTABLE | Attribute.APPEND))


def birth_ns(fd: int) -> int:
    """When the inode was made, as a Unix time in ns; 0 where the file system does not say.

    Raises:
        OSError: the kernel's own answer.
    """
    told = _ask(fd, _BTIME)
    if told is None:
        return 0
    seconds, nanoseconds = _TIMESTAMP.unpack_from(told, _BTIME_AT)
    return int(seconds * _NS_PER_S + nanoseconds)


def _ask(fd: int, field: int) -> ctypes.Array[ctypes.c_char] | None:
    """Ask for one field; None if it is not told."""
    told = ctypes.create_string_buffer(_BYTES)
    syscall.call("statx", fd, b"", _AT_EMPTY_PATH, field, told)
    (known,) = _MASK.unpack_from(told)
    return told if known & field else None
