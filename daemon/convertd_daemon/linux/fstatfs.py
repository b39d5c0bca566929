"""fstatfs(2): the type of an inode's file system."""

import ctypes
import enum
import struct
from typing import Final

from convertd_daemon.linux import syscall

# Source: statfs(2): struct statfs begins with f_type, a long; the whole has 120 bytes.
_BYTES: Final = 256
_TYPE: Final = struct.Struct("@l")


class Magic(enum.IntEnum):
    """A type of file system. Source: linux/magic.h, statfs(2), fs/bcachefs/bcachefs_format.h."""

    BCACHEFS = 0xCA451A4E
    BTRFS = 0x9123683E
    EXT4 = 0xEF53  # ext2 and ext3 too
    F2FS = 0xF2F52010
    TMPFS = 0x01021994
    XFS = 0x58465342


def magic(fd: int) -> int:
    """Return the file system's magic number. The descriptor may be O_PATH.

    Raises:
        OSError: as fstatfs(2).
    """
    buffer = ctypes.create_string_buffer(_BYTES)
    syscall.call("fstatfs", fd, buffer)
    (number,) = _TYPE.unpack_from(buffer)
    return int(number)
