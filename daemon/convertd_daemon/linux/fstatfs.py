"""fstatfs(2): which kind of file system an inode is on."""

import ctypes
import enum
import struct
from typing import Final

from convertd_daemon.linux import syscall

# Source: statfs(2): struct statfs begins with f_type, a long; the whole has 120 bytes.
_BYTES: Final = 256
_TYPE: Final = struct.Struct("@l")


class Magic(enum.IntEnum):
    """A kind of file system. Source: linux/magic.h, statfs(2), fs/bcachefs/bcachefs_format.h."""

    BCACHEFS = 0xCA451A4E
    BTRFS = 0x9123683E
    EXT4 = 0xEF53  # ext2 and ext3 too
    F2FS = 0xF2F52010
    TMPFS = 0x01021994
    XFS = 0x58465342


def magic(fd: int) -> int:
    """Give the number of the file system's kind. The descriptor may be of O_PATH.

    Raises:
        OSError: the kernel's own answer.
    """
    told = ctypes.create_string_buffer(_BYTES)
    syscall.call("fstatfs", fd, told)
    (number,) = _TYPE.unpack_from(told)
    return int(number)
