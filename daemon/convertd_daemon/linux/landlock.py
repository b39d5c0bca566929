"""landlock(7): plain wrappers of its calls; `sandbox` decides which rights to ask for."""

import enum
import errno
import struct
from typing import Final

from convertd_daemon.linux import syscall

_CREATE_RULESET_VERSION: Final = 1
_RULE_PATH_BENEATH: Final = 1


class AccessFs(enum.IntFlag):
    """Rights on files. Source: linux/landlock.h, LANDLOCK_ACCESS_FS_*."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


class AccessNet(enum.IntFlag):
    """Rights on TCP ports. Source: linux/landlock.h, LANDLOCK_ACCESS_NET_*."""

    BIND_TCP = 1 << 0
    CONNECT_TCP = 1 << 1


class Scope(enum.IntFlag):
    """Actions confined to the domain. Source: linux/landlock.h, LANDLOCK_SCOPE_*."""

    ABSTRACT_UNIX_SOCKET = 1 << 0
    SIGNAL = 1 << 1


def abi() -> int:
    """Return the kernel's Landlock ABI; 0 when Landlock is not built in or off.

    Raises:
        OSError: anything but ENOSYS (not built) and EOPNOTSUPP (not among the boot's LSMs).
    """
    try:
        return syscall.call("landlock_create_ruleset", None, 0, _CREATE_RULESET_VERSION)
    except OSError as error:
        if error.errno in {errno.ENOSYS, errno.EOPNOTSUPP}:
            return 0
        raise


def create_ruleset(*, fs: AccessFs, net: AccessNet, scope: Scope) -> int:
    """Make a ruleset that denies these rights; returns its descriptor (close-on-exec).

    An older kernel accepts the longer struct if the fields that it does not know are zero.

    Raises:
        OSError: EINVAL or E2BIG, this kernel's ABI does not know one of the rights.
    """
    attr = struct.pack("QQQ", fs, net, scope)
    return syscall.call("landlock_create_ruleset", attr, len(attr), 0)


def add_rule(ruleset: int, inode: int, access: AccessFs) -> None:
    """Allow `access` on the inode behind a descriptor, and beneath it if it is a directory.

    Raises:
        OSError: EINVAL, a right that is not handled or makes no sense for a file;
            EBADFD, the inode has no path that Landlock could govern (a pipe, a memfd).
    """
    rule = struct.pack("=Qi", access, inode)  # packed in the kernel's header, too
    syscall.call("landlock_add_rule", ruleset, _RULE_PATH_BENEATH, rule, 0)


def restrict_self(ruleset: int) -> None:
    """Enforce a ruleset on the calling thread and its future children, for ever.

    Raises:
        OSError: EPERM, no_new_privs is not set; E2BIG, 16 layers are there already.
    """
    syscall.call("landlock_restrict_self", ruleset, 0)
