"""Whether an inode takes direct I/O: the kernel's promise, or else a trial.

A file system may accept O_DIRECT at open and refuse it at the first transfer, or the reverse. Some
tell what they take, in statx(2). On all others, and where statx says no, 4096 aligned bytes are
transferred, to or from the inode itself. That takes the disk 3 ms (ext4, 2026-11).
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Final

from convertd_daemon.linux import statx

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK_BYTES: Final = 4096


def read_refusal(fd: int) -> str | None:
    """What the kernel says against reading the inode with O_DIRECT; None if it works."""
    return _refusal(fd, os.O_RDONLY, os.preadv)


def write_refusal(fd: int) -> str | None:
    """What the kernel says against writing the empty inode with O_DIRECT; None if it works.

    Leaves the inode empty. `fd` is open for writing.

    Raises:
        ValueError: it is not empty, and would lose what it holds.
    """
    if os.fstat(fd).st_size:
        raise ValueError("the inode holds data")
    refusal = _refusal(fd, os.O_WRONLY, os.pwritev)
    os.ftruncate(fd, 0)
    return refusal


def _refusal(
    fd: int, flags: int, transfer: Callable[[int, list[mmap.mmap], int], int]
) -> str | None:
    """What the kernel says against such a transfer, in words; None if it works."""
    if _is_promised(fd):
        return None
    try:
        direct = os.open(f"/proc/self/fd/{fd}", flags | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        return os.strerror(error.errno or 0)
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as block:
            transfer(direct, [block], 0)
    except OSError as error:
        return os.strerror(error.errno or 0)
    finally:
        os.close(direct)
    return None


def _is_promised(fd: int) -> bool:
    """Whether the kernel says that blocks of ours can be transferred with O_DIRECT."""
    try:
        alignment = statx.direct_alignment(fd)
    except OSError:
        return False  # a filter that refuses statx(2)
    return alignment is not None and (
        0 < alignment.memory <= BLOCK_BYTES and 0 < alignment.offset <= BLOCK_BYTES
    )
