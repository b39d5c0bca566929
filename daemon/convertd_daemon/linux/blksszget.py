"""ioctl(2), BLKSSZGET: a block device's logical sector size."""

import fcntl
import struct
from typing import Final

_BLKSSZGET: Final = 0x1268  # _IO(0x12, 104), linux/fs.h; the same on every architecture of ours


def sector_bytes(descriptor: int) -> int:
    """Return the device's smallest unit of I/O.

    Raises:
        OSError: ENOTTY, it is no block device.
    """
    packed = fcntl.ioctl(descriptor, _BLKSSZGET, bytes(4))
    size: int = struct.unpack("i", packed)[0]
    return size
