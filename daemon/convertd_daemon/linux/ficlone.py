"""ioctl_ficlone(2), ioctl_ficlonerange(2): share a file's blocks with another, copy-on-write."""

import fcntl
import struct
from typing import Final

# Source: linux/fs.h; the same on every architecture.
_FICLONE: Final = 0x40049409  # _IOW(0x94, 9, int)
_FICLONERANGE: Final = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range)
_FILE_CLONE_RANGE: Final = struct.Struct("=qQQQ")


def ficlone(dest: int, source: int) -> None:
    """Make `dest` share all blocks of `source`, without copying data.

    Raises:
        OSError: EOPNOTSUPP, EXDEV, EINVAL: the file system can't, or not for these two files.
    """
    fcntl.ioctl(dest, _FICLONE, source)


def ficlonerange(
    dest: int, source: int, *, dest_offset: int, source_offset: int, length: int
) -> None:
    """Make a range of `dest` share the blocks of a range of `source`, without copying data.

    All in bytes, and whole blocks of the file system; only at the end of `source`, where it is not
    before the end of `dest`, part of a block is possible. A `length` of 0 goes up to the end.

    Raises:
        OSError: as ficlone; EINVAL too where these are no whole blocks.
    """
    asked = _FILE_CLONE_RANGE.pack(source, source_offset, length, dest_offset)
    fcntl.ioctl(dest, _FICLONERANGE, asked)
