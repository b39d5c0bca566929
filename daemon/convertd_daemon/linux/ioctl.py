"""ioctl(2): those of block devices, and those that share blocks of files, copy-on-write."""

import fcntl
import struct
from typing import Final

# Source: linux/fs.h. The same on every architecture of ours.
_BLKSSZGET: Final = 0x1268  # _IO(0x12, 104)
_BLKZEROOUT: Final = 0x127F  # _IO(0x12, 127)
_FICLONE: Final = 0x40049409  # _IOW(0x94, 9, int)
_FICLONERANGE: Final = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range)
_FILE_CLONE_RANGE: Final = struct.Struct("=qQQQ")


def blksszget(descriptor: int) -> int:
    """Return a block device's logical sector size: its smallest unit of I/O, in bytes.

    Raises:
        OSError: ENOTTY, it is no block device.
    """
    packed = fcntl.ioctl(descriptor, _BLKSSZGET, bytes(4))
    size: int = struct.unpack("i", packed)[0]
    return size


def blkzeroout(descriptor: int, start_byte: int, length_bytes: int) -> None:
    """Zero a range, by writing or by the device's own command. It is whole logical sectors.

    Raises:
        OSError: EINVAL for a range that is not aligned or not on the device; EIO.
    """
    fcntl.ioctl(descriptor, _BLKZEROOUT, struct.pack("QQ", start_byte, length_bytes))


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
