"""Walk to a directory, and tell at each step whether anybody but root could change what is there.

Every directory is opened below the one before, and none by a symbolic link, so that what was judged
is what is used.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class CantOpen(Exception):
    """A step of the way that can't be taken, and why; the text names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A directory on the way: its path so far, open with O_PATH, and what is known of it."""

    path: str
    fd: int
    status: os.stat_result


def walk(directory: str, kept: contextlib.ExitStack) -> Iterator[Step]:
    """Go from / to an absolute path, both included. The descriptors are closed with the stack.

    Raises:
        CantOpen: a step is missing, a symbolic link, or no directory.
    """
    above, so_far = None, "/"
    for name in ("/", *filter(None, directory.split("/"))):
        so_far = os.path.join(so_far, name)
        above = open_step(so_far, above, os.O_PATH | os.O_DIRECTORY)
        kept.callback(os.close, above)
        yield Step(path=so_far, fd=above, status=os.fstat(above))


def open_step(path: str, directory: int | None, flags: int) -> int:
    """Open the last name of a path below its directory, and follow no link.

    Raises:
        CantOpen: it can't be opened, or is a link.
    """
    name = os.path.basename(path) or "/"
    try:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:
        # With O_DIRECTORY a link gives ENOTDIR, without it ELOOP. Source: open(2).
        if error.errno in {errno.ELOOP, errno.ENOTDIR}:
            reason = f"{path} is a symbolic link or not a directory, and is not followed"
        else:
            reason = f"{path}: {os.strerror(error.errno or 0)}"
        raise CantOpen(reason) from error


def problem_of(path: str, status: os.stat_result, *, sticky_will_do: bool = False) -> str:
    """Say why somebody else than root could change it; empty if nobody could.

    In a sticky directory of root's nobody can rename or remove what is root's: that will do for one
    that was made by us and is checked after. Write permission by an access control list shows in
    the group's bits too. Source: acl(5).
    """
    if status.st_uid != 0:
        return f"{path} belongs to uid {status.st_uid}, not to root"
    if sticky_will_do and status.st_mode & stat.S_ISVTX:
        return ""
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        return f"{path} can be written by others than root (mode {mode:04o})"
    return ""
