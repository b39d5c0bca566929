"""Walk from `/` to a directory, one name at a time.

Fails closed. Each directory is opened below the one before and stays open, so that the directory
that was judged is the one that is used. No link is followed; `followed` gives each one, as a step.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from convertd_daemon.linux.openat2 import Resolve, openat2

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Iterator

STRICTLY: Final = Resolve.NO_SYMLINKS | Resolve.NO_MAGICLINKS

MOST_LINKS: Final = 40
"""As the kernel's MAXSYMLINKS. Source: linux/namei.h."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A directory on the way, open with O_PATH for as long as the walk's stack lasts."""

    path: str
    fd: int
    status: os.stat_result


def steps(path: str, stack: contextlib.ExitStack) -> Iterator[Step]:
    """Open `/` and each directory down to `path`, which is absolute and normal. `stack` closes.

    Raises:
        OSError: one of them is not there, is a link, or no directory. See open_step.
    """
    here = _top(stack)
    yield here
    for name in filter(None, path.split("/")):
        here = _next(here, name, os.O_PATH | os.O_DIRECTORY, stack)
        yield here


def followed(path: str, stack: contextlib.ExitStack) -> Iterator[tuple[Step, Step]]:
    """Walk a path and all links on it: each directory, and what has the next name in there.

    That is a directory, a link, or in the end whatever it is. `path` is absolute. `stack` closes.

    Raises:
        OSError: one of them is not there, or no directory, or there are too many links.
    """
    above, left, links = [_top(stack)], path.split("/")[::-1], 0
    while left:
        name = left.pop()
        if name in {"", "."}:
            continue
        if name == "..":
            del above[max(1, len(above) - 1) :]
            continue
        found = _next(above[-1], name, os.O_PATH | os.O_NOFOLLOW, stack)
        yield above[-1], found
        if not stat.S_ISLNK(found.status.st_mode):
            above.append(found)
            continue
        links += 1
        if links > MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        target = os.readlink("", dir_fd=found.fd)
        if target.startswith("/"):
            del above[1:]
        left += target.split("/")[::-1]


def _top(stack: contextlib.ExitStack) -> Step:
    fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return Step(path="/", fd=fd, status=os.fstat(fd))


def _next(here: Step, name: str, flags: int, stack: contextlib.ExitStack) -> Step:
    path = os.path.join(here.path, name)
    fd = open_step(here.fd, path, flags)
    stack.callback(os.close, fd)
    return Step(path=path, fd=fd, status=os.fstat(fd))


def open_step(directory: int, path: str, flags: int) -> int:
    """Open the last name of a path below its directory, and follow no link.

    Raises:
        OSError: the kernel's own answer; its file name is the whole path.
    """
    name = os.path.basename(path)
    try:
        try:
            return openat2(directory, name, flags=flags, resolve=STRICTLY)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:
        error.filename = path
        raise


_REFUSED: Final = frozenset({errno.ENOSYS, errno.EPERM})
"""What openat2(2) answers where systemd's RestrictSUIDSGID= refuses it: a service that has no
drop-in yet walks to its socket and its policy all the same. Of one name O_NOFOLLOW is enough."""


def reason(error: OSError) -> str:
    """Say in one clause why a step could not be opened."""
    if error.errno in {errno.ELOOP, errno.ENOTDIR}:
        return f"{error.filename} is a symbolic link or not a directory, and is not followed"
    return f"{error.filename}: {os.strerror(error.errno or 0)}"
