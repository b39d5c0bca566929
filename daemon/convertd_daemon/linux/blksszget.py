"""ioctl(2), BLKSSZGET: the size of a block device's logical sectors."""

import fcntl
import struct
from typing import Final

_BLKSSZGET: Final = 0x1268  # _IO(0x12, 104), linux/fs.h; the same on every architecture of ours


def sector_bytes(descriptor: int) -> int:
    """Give the least that the device reads and writes.

    Raises:
        OSError: ENOTTY, it is no block device.
    """
    answer = fcntl.ioctl(descriptor, _BLKSSZGET, bytes(4))
    size: int = struct.unpack("i", answer)[0]
    return size
