"""renameat2(2): rename within one directory, without replacing, or by exchanging two names."""

import enum
import os

from convertd_daemon.linux import syscall


class Flag(enum.IntFlag):
    """What to do if the new name exists. Source: renameat2(2), linux/fs.h."""

    NOREPLACE = 0x1
    EXCHANGE = 0x2


def renameat2(directory: int, old: str, new: str, flag: Flag) -> None:
    """Rename `old` to `new`, both in `directory`.

    NOREPLACE fails if `new` exists. EXCHANGE gives each file the other's name in one step, so that
    neither name is ever missing; both must exist.

    Raises:
        OSError: EEXIST or ENOENT, as above; EINVAL, the file system can't; others as renameat2(2).
        ValueError: a name has a NUL byte, at which the kernel would silently cut it.
    """
    names = [os.fsencode(name) for name in (old, new)]
    if any(b"\0" in name for name in names):
        raise ValueError("embedded null byte")
    syscall.call("renameat2", directory, names[0], directory, names[1], flag)
