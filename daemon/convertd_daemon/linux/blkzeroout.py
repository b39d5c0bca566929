"""ioctl(2), BLKZEROOUT: make a range of a block device read as zeroes."""

import fcntl
import struct
from typing import Final

_BLKZEROOUT: Final = 0x127F  # _IO(0x12, 127), linux/fs.h; the same on every architecture of ours


def blkzeroout(descriptor: int, start_byte: int, length_bytes: int) -> None:
    """Zero a range, by writing or by the device's own command. It is whole logical sectors.

    Raises:
        OSError: EINVAL for a range that is not aligned or not on the device; EIO.
    """
    fcntl.ioctl(descriptor, _BLKZEROOUT, struct.pack("QQ", start_byte, length_bytes))
