"""statx(2): size, times and attributes of an inode, and its alignment for direct I/O."""

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
    """Flags that chattr(1) sets. Source: statx(2), linux/stat.h."""

    IMMUTABLE = 0x10
    APPEND = 0x20


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectAlignment:
    """The alignment of direct I/O in bytes, in memory and in the file; 0: no direct I/O."""

    memory: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """Size and modification time, to detect that a file's content changed."""

    size_bytes: int
    mtime_ns: int


def content(fd: int) -> Content:
    """Query size and modification time, from the server of a network file system too.

    fstat(2) may answer from the client's cache: of NFS for a minute, of FUSE for as long as the
    file system allows. Source: statx(2), AT_STATX_FORCE_SYNC.

    Raises:
        OSError: as statx(2).
    """
    buffer = ctypes.create_string_buffer(_BYTES)
    syscall.call("statx", fd, b"", _AT_EMPTY_PATH | _AT_STATX_FORCE_SYNC, _MTIME | _SIZE, buffer)
    (size,) = _SIZE_OF.unpack_from(buffer, _SIZE_AT)
    seconds, nanoseconds = _TIMESTAMP.unpack_from(buffer, _MTIME_AT)
    return Content(size_bytes=size, mtime_ns=seconds * _NS_PER_S + nanoseconds)


def direct_alignment(fd: int) -> DirectAlignment | None:
    """Query the alignment of direct I/O; None where kernel or file system do not report it.

    Linux 6.1 and later report it for ext4, XFS, f2fs and block devices; not for btrfs, tmpfs and
    most network file systems.

    Raises:
        OSError: as statx(2).
    """
    buffer = _query(fd, _DIOALIGN)
    if buffer is None:
        return None
    memory, offset = _ALIGNMENTS.unpack_from(buffer, _ALIGNMENTS_AT)
    return DirectAlignment(memory=memory, offset=offset)


def attributes(fd: int) -> Attribute:
    """Query the inode's attributes; none on a file system without attributes.

    Raises:
        OSError: as statx(2).
    """
    buffer = ctypes.create_string_buffer(_BYTES)
    syscall.call("statx", fd, b"", _AT_EMPTY_PATH, 0, buffer)
    (found,) = _ATTRIBUTES.unpack_from(buffer, _ATTRIBUTES_AT)
    return Attribute(found & (Attribute.IMMUTABLE | Attribute.APPEND))


def birth_ns(fd: int) -> int:
    """Query the inode's birth time, in ns since the epoch; 0 where the file system has none.

    Raises:
        OSError: as statx(2).
    """
    buffer = _query(fd, _BTIME)
    if buffer is None:
        return 0
    seconds, nanoseconds = _TIMESTAMP.unpack_from(buffer, _BTIME_AT)
    return int(seconds * _NS_PER_S + nanoseconds)


def _query(fd: int, field: int) -> ctypes.Array[ctypes.c_char] | None:
    """Query one field; None if it is not reported."""
    buffer = ctypes.create_string_buffer(_BYTES)
    syscall.call("statx", fd, b"", _AT_EMPTY_PATH, field, buffer)
    (known,) = _MASK.unpack_from(buffer)
    return buffer if known & field else None
