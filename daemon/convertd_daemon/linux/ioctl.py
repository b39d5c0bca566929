"""ioctl(2): those of block devices."""

import fcntl
import struct
from typing import Final

# Source: linux/fs.h. The same on every architecture of ours.
_BLKSSZGET: Final = 0x1268  # _IO(0x12, 104)
_BLKZEROOUT: Final = 0x127F  # _IO(0x12, 127)


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
