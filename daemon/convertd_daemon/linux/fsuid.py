"""setfsuid(2) and setfsgid(2): the ids that the kernel checks and uses for file access.

A change of either disarms PR_SET_PDEATHSIG. Leaving fsuid 0 also clears CHOWN, DAC_OVERRIDE,
DAC_READ_SEARCH, FOWNER and the like from the effective set; going back to 0 restores those that are
permitted. Source: capabilities(7), "Effect of user ID changes on capabilities".
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Final

from convertd_daemon.linux import syscall

_QUERY: Final = -1  # an invalid id: the call changes nothing and returns the current one


def _set(name: str, identity: int) -> None:
    # Neither call reports failure; a second call is the documented way to detect it.
    syscall.call(name, identity)
    now = syscall.call(name, _QUERY) & 0xFFFFFFFF
    if now != identity:
        raise OSError(errno.EPERM, f"{name}({identity}): still {now}")


def setfsuid(uid: int) -> None:
    """Use `uid` for file access, in the calling thread.

    Raises:
        OSError: EPERM, without CAP_SETUID it must be one of the thread's own.
    """
    _set("setfsuid", uid)


def setfsgid(gid: int) -> None:
    """Use `gid` for file access and as the group of new files, in the calling thread.

    Raises:
        OSError: EPERM, without CAP_SETGID it must be one of the thread's own.
    """
    _set("setfsgid", gid)


@contextlib.contextmanager
def file_access_as(uid: int, gid: int) -> Iterator[None]:
    """Use these ids for file access in the block. The supplementary groups stay as they are.

    Raises:
        OSError: as setfsuid and setfsgid.
    """
    with contextlib.ExitStack() as undo:
        undo.callback(setfsgid, os.getegid())
        setfsgid(gid)
        undo.callback(setfsuid, os.geteuid())
        setfsuid(uid)
        yield
