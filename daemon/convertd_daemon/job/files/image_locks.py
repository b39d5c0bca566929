"""The locks with which a qemu that uses an image keeps others from using it at the same time.

Each kind of use has a byte. A qemu read-locks those of its own uses, and, 100 bytes further, those
of the uses that it allows nobody else; then it looks whether others have locked the opposite.
Source: qemu block/file-posix.c, raw_apply_lock_bytes(), raw_check_lock_bytes().
"""

from __future__ import annotations

from typing import Final

from convertd_daemon.linux import locks

READS: Final = 100
WRITES: Final = 101
RESIZES: Final = 103
"""The bytes of the uses: 100, and the bit of BLK_PERM_CONSISTENT_READ, _WRITE, _RESIZE."""

TO_OTHERS: Final = 100
"""How far beyond these the bytes are that refuse a use to others."""


def lock_for_reading(fd: int) -> bool:
    """Lock a raw image as a qemu-img that reads it does, until `unlock`.

    False if another process uses it in a way that does not go with that; it may be locked then.

    Raises:
        OSError: the file system has no locks.
    """
    for byte in (READS, WRITES + TO_OTHERS, RESIZES + TO_OTHERS):
        locks.lock_for_reading(fd, byte, byte)
    opposite = (READS + TO_OTHERS, WRITES, RESIZES)
    return not any(locks.is_locked(fd, byte, byte) for byte in opposite)


def is_being_written(fd: int) -> bool:
    """Whether a qemu says that it may write the image."""
    return locks.is_locked(fd, WRITES, WRITES)


def unlock(fd: int) -> None:
    """Give these locks up.

    Raises:
        OSError: the kernel's own answer.
    """
    locks.unlock(fd, READS, RESIZES + TO_OTHERS)
