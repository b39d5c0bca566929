"""openat2(2): open a path with restrictions on how the kernel resolves it."""

import enum
import errno
import os
import struct
from typing import Final

from convertd_daemon.linux import syscall

AT_FDCWD: Final = -100
"""The working directory, and for an absolute path nothing. Source: linux/fcntl.h."""

# A rename or mount anywhere on the machine can make one path walk fail with EAGAIN. So many in a
# row take a process that renames all the time, which must not keep us here for ever.
_ATTEMPTS: Final = 1000


class Resolve(enum.IntFlag):
    """What a path walk refuses. Source: openat2(2), linux/openat2.h."""

    NO_XDEV = 0x01
    NO_MAGICLINKS = 0x02
    NO_SYMLINKS = 0x04
    BENEATH = 0x08
    IN_ROOT = 0x10
    CACHED = 0x20


def openat2(
    directory: int, path: str | bytes, *, flags: int, resolve: Resolve, mode: int = 0
) -> int:
    """Open `path` below (or from) `directory`; returns a descriptor, always close-on-exec.

    EAGAIN, which BENEATH gives when something was renamed during the walk, is retried.

    Raises:
        OSError: as openat2(2), for example ELOOP for a link, EXDEV for a path out of `directory`.
        ValueError: the path has a NUL byte, at which the kernel would silently cut it.
    """
    name = os.fsencode(path)
    if b"\0" in name:
        raise ValueError("embedded null byte")
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, resolve)
    for _ in range(_ATTEMPTS):
        try:
            return syscall.call("openat2", directory, name, how, len(how))
        except OSError as error:
            if error.errno not in {errno.EAGAIN, errno.EINTR}:
                raise OSError(error.errno, os.strerror(error.errno or 0), path) from None
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)
