"""syscall(2): system calls without a wrapper in Python or in every supported libc."""

import ctypes
import errno
import os
from collections.abc import Mapping
from typing import Any, Final

# Calls added since Linux 5.1 have one number on all architectures, 424 and up. Those that are never
# made here are for seccomp filters: an older libseccomp does not know their names.
# Source: scripts/syscall.tbl of the kernel.
SINCE_5_1: Final[Mapping[str, int]] = {
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_open": 434,
    "clone3": 435,
    "close_range": 436,
    "openat2": 437,
    "pidfd_getfd": 438,
    "faccessat2": 439,
    "process_madvise": 440,
    "epoll_pwait2": 441,
    "mount_setattr": 442,
    "quotactl_fd": 443,
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
    "memfd_secret": 447,
    "process_mrelease": 448,
    "futex_waitv": 449,
    "set_mempolicy_home_node": 450,
    "fchmodat2": 452,
    "map_shadow_stack": 453,
    "futex_wake": 454,
    "futex_wait": 455,
    "futex_requeue": 456,
    "statmount": 457,
    "listmount": 458,
    "mseal": 462,
    "setxattrat": 463,
    "getxattrat": 464,
    "listxattrat": 465,
    "removexattrat": 466,
    "open_tree_attr": 467,
    "file_getattr": 468,
    "file_setattr": 469,
}

# Source: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
_BEFORE_5_1: Final[Mapping[str, Mapping[str, int]]] = {
    "x86_64": {
        "setfsuid": 122,
        "setfsgid": 123,
        "capget": 125,
        "capset": 126,
        "fstatfs": 138,
        "unshare": 272,
        "renameat2": 316,
        "seccomp": 317,
        "execveat": 322,
        "statx": 332,
    },
    "aarch64": {
        "fstatfs": 44,
        "capget": 90,
        "capset": 91,
        "unshare": 97,
        "setfsuid": 151,
        "setfsgid": 152,
        "renameat2": 276,
        "seccomp": 277,
        "execveat": 281,
        "statx": 291,
    },
}

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


def number(name: str) -> int:
    """Return a system call's number on this machine.

    Raises:
        OSError: ENOSYS, the number on this architecture (or in 32-bit Python) is not known here.
    """
    if name in SINCE_5_1:
        return SINCE_5_1[name]
    machine = os.uname().machine
    # A 32-bit process on a 64-bit kernel sees "x86_64" too, but has other numbers.
    if ctypes.sizeof(ctypes.c_void_p) == 8 and name in _BEFORE_5_1.get(machine, {}):  # noqa: PLR2004
        return _BEFORE_5_1[machine][name]
    raise OSError(errno.ENOSYS, f"no number known for {name} on {machine}")


def call(name: str, *arguments: int | bytes | ctypes.Array[Any] | None) -> int:
    """Make a system call; bytes and arrays are passed by address.

    Raises:
        OSError: with the kernel's errno and the call's name.
    """
    # ctypes would pass a plain int as a 32-bit int, which leaves half a register undefined.
    widened = [
        ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments
    ]
    result: int = _syscall(ctypes.c_long(number(name)), *widened)
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result
