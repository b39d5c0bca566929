"""openat2(2): open a path while the kernel refuses what the way to it must not contain."""

import enum
import errno
import os
import struct
from typing import Final

from convertd_daemon.linux import syscall

# A rename or mount anywhere on the machine can make one walk fail with EAGAIN; it takes somebody
# who renames all the time to make this many fail in a row, and that must not hold us for ever.
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
    """Open `path` below (or from) `directory` and give the descriptor, always close-on-exec.

    EAGAIN, which BENEATH gives when something was renamed during the walk, is retried.

    Raises:
        OSError: the kernel's own answer, for example ELOOP for a link, EXDEV for a way out.
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
