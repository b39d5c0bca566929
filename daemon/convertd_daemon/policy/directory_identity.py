"""Which directory a descriptor leads to, whatever its name."""

from __future__ import annotations

import os
from typing import Final

from convertd_core import values
from convertd_daemon.linux import fstatfs, statx

KEEP_BIRTHS: Final = frozenset(fstatfs.Magic)
"""Where an inode has one time of birth for as long as it lives, which no user can set."""


def of(fd: int) -> values.DirectoryIdentity:
    """Ask the kernel which directory this is. The descriptor may be O_PATH.

    Raises:
        OSError: the kernel's own answer.
    """
    status = os.fstat(fd)
    return values.DirectoryIdentity(
        device=status.st_dev,
        inode=status.st_ino,
        born_ns=statx.birth_ns(fd),
        keeps_birth=fstatfs.magic(fd) in KEEP_BIRTHS,
    )
