"""Whether an inode takes direct I/O, found out by doing it.

A file system may accept O_DIRECT at open and refuse it at the first transfer, or the reverse; there
is no flag to ask. So 4096 aligned bytes are transferred, to or from the very inode in question.
"""

from __future__ import annotations

import mmap
import os
from typing import Final

BLOCK_BYTES: Final = 4096


def read_refusal(fd: int) -> str | None:
    """What the kernel says against reading the inode with O_DIRECT; None if it works."""
    try:
        direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        return os.strerror(error.errno or 0)
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as block:
            os.preadv(direct, [block], 0)
    except OSError as error:
        return os.strerror(error.errno or 0)
    finally:
        os.close(direct)
    return None


def write_refusal(fd: int) -> str | None:
    """What the kernel says against writing the empty inode with O_DIRECT; None if it works.

    Leaves the inode empty.

    Raises:
        ValueError: it is not empty, and would lose what it holds.
    """
    if os.fstat(fd).st_size:
        raise ValueError("the inode holds data")
    try:
        direct = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        return os.strerror(error.errno or 0)
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as block:
            os.pwritev(direct, [block], 0)
    except OSError as error:
        return os.strerror(error.errno or 0)
    finally:
        os.ftruncate(direct, 0)
        os.close(direct)
    return None
