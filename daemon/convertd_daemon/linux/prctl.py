"""prctl(2): operations on the calling process or thread, those that we need."""

import ctypes
import os
from typing import Final

_SET_PDEATHSIG: Final = 1
_SET_DUMPABLE: Final = 4
_SET_KEEPCAPS: Final = 8
_SET_NAME: Final = 15
_CAPBSET_READ: Final = 23
_CAPBSET_DROP: Final = 24
_SET_CHILD_SUBREAPER: Final = 36
_SET_NO_NEW_PRIVS: Final = 38
_CAP_AMBIENT: Final = 47
_CAP_AMBIENT_RAISE: Final = 2
_CAP_AMBIENT_CLEAR_ALL: Final = 4

_prctl = ctypes.CDLL(None, use_errno=True).prctl
_prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


def _call(operation: int, *arguments: int) -> int:
    # Unused arguments must be zero for the newer operations.
    padded = (*arguments, 0, 0, 0, 0)[:4]
    result: int = _prctl(operation, *padded)
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({operation}): {os.strerror(error)}")
    return result


def set_no_new_privs() -> None:
    """Have no execve(2) of this thread or its children grant privileges. Irreversible."""
    _call(_SET_NO_NEW_PRIVS, 1)


def set_pdeathsig(signal: int) -> None:
    """Have the kernel send `signal` when the parent's thread exits; 0 disarms.

    The next change of uid, gid or fsuid clears it. If the parent exited before the call, no signal
    is sent: compare getppid(2) afterwards.
    """
    _call(_SET_PDEATHSIG, signal)


def set_child_subreaper() -> None:
    """Become the parent of orphaned descendants, instead of pid 1."""
    _call(_SET_CHILD_SUBREAPER, 1)


def set_keepcaps(*, keep: bool) -> None:
    """Keep the permitted set when all uids change from 0 to another."""
    _call(_SET_KEEPCAPS, int(keep))


def set_dumpable(*, dumpable: bool) -> None:
    """Allow or forbid core dumps, and ptrace(2) by the same uid."""
    _call(_SET_DUMPABLE, int(dumpable))


def set_name(name: str) -> None:
    """Name the calling thread, as ps(1) and /proc/PID/comm show it; truncated to 15 bytes."""
    _call(_SET_NAME, ctypes.addressof(ctypes.create_string_buffer(os.fsencode(name)[:15])))


def capbset_read(capability: int) -> bool:
    """Whether the bounding set has a capability.

    Raises:
        OSError: EINVAL, this kernel has no such capability.
    """
    return _call(_CAPBSET_READ, capability) == 1


def capbset_drop(capability: int) -> None:
    """Drop a capability from the bounding set, for ever.

    Raises:
        OSError: EPERM without CAP_SETPCAP.
    """
    _call(_CAPBSET_DROP, capability)


def cap_ambient_raise(capability: int) -> None:
    """Keep a permitted and inheritable capability through execve(2).

    Raises:
        OSError: EPERM, it is not both permitted and inheritable.
    """
    _call(_CAP_AMBIENT, _CAP_AMBIENT_RAISE, capability)


def cap_ambient_clear_all() -> None:
    """Empty the ambient set."""
    _call(_CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL)
