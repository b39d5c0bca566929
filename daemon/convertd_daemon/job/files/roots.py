"""Open a root as it is now, and the path below it. Fails closed.

Two things hold in addition to what openat2(2) refuses. Each job checks both again:

- Only root and those whom the policy names could have put another directory in place of a root that
  is opened with the daemon's rights.
- The path enters no other root. By name it can't, for the longest root decides; but a directory can
  be renamed, mounted twice, or found by another spelling of its name. So each directory on the path
  is compared, while it is open, with what the other roots were when the policy was loaded, and with
  what has their names now.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import stat
from typing import TYPE_CHECKING, Final

from convertd_core import conditions, values
from convertd_daemon.linux.openat2 import Resolve, openat2
from convertd_daemon.policy import directory_identity, path_walk, writers

if TYPE_CHECKING:
    from collections.abc import Iterator

_CALLERS_AFFAIR: Final = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EXDEV}
)
"""Errors on the way to a root that are reported like those of any path in it."""

_CANT_BE_MET: Final = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV, errno.EACCES, errno.ENAMETOOLONG),
        *(errno.ESTALE, errno.ENOTCONN, errno.EIO, errno.ETIMEDOUT, errno.EHOSTDOWN),
    }
)
"""Errors of a nested root that mean that no path leads into it now: it is missing or broken."""


def open_beneath(place: values.Place, below: str, flags: int) -> int:
    """Resolve a way below a root of files, and open what it leads to with O_PATH.

    Raises:
        OSError: the kernel refuses; EXDEV if the way leads over a mount point, or into another
            root.
        conditions.RootUnusable: as open_root.
    """
    inside = path_walk.STRICTLY | Resolve.BENEATH
    if not place.root.mounts:
        inside |= Resolve.NO_XDEV
    with contextlib.ExitStack() as stack:
        here = open_root(place)
        stack.callback(os.close, here)
        met = (*_recorded(place), *_named_now(place, here, inside, stack))
        names = below.split("/") if below else ["."]
        for name in names[:-1]:
            here = openat2(here, name, flags=os.O_PATH | os.O_DIRECTORY, resolve=inside)
            stack.callback(os.close, here)
            _refuse_others(here, os.fstat(here), met)
        last = openat2(here, names[-1], flags=os.O_PATH | flags, resolve=inside)
        stack.callback(os.close, last)
        _refuse_others(last, os.fstat(last), met)
        return os.dup(last)


def open_root(place: values.Place) -> int:
    """Open the root of a place, of files, with O_PATH. All of its way is free of links.

    Raises:
        OSError: it is not there, a link is on the way, the rights in force do not suffice, or
            (EXDEV) another root has taken its place.
        conditions.RootUnusable: it can't be opened for another reason, or a user whom the policy
            does not name could put another directory in its place.
    """
    root = place.root
    with contextlib.ExitStack() as stack:
        try:
            way = list(path_walk.steps(root.path, stack))
            if root.access is values.RootAccess.DAEMON:
                check_parents(root, way)
            met = _recorded(place)
            for step in way:
                _refuse_others(step.fd, step.status, met)
            return os.dup(way[-1].fd)
        except OSError as error:
            if error.errno in _CALLERS_AFFAIR:
                raise
            problem = os.strerror(error.errno or 0)
            raise conditions.RootUnusable(root=root.path, problem=problem) from error


def check_parents(root: values.Root, way: list[path_walk.Step]) -> None:
    """Refuse a root that a user whom the policy does not name could replace.

    Raises:
        conditions.RootUnusable: such a user could.
        OSError: an access control list could not be read.
    """
    is_block = root.kind is values.RootKind.BLOCK
    for found in writers.above(root.path, way, is_block=is_block):
        if beyond := found.beyond(root):
            problem = f"{beyond}, which the policy does not name"
            raise conditions.RootUnusable(root=root.path, problem=problem)


def check_devices(root: values.Root) -> None:
    """Check a root of devices in the same way.

    udev's links are followed there, so no other user may create one in the root itself either.

    Raises:
        conditions.RootUnusable: such a user could.
        OSError: an access control list could not be read.
    """
    if root.access is not values.RootAccess.DAEMON:
        return
    with contextlib.ExitStack() as stack:
        way: list[path_walk.Step] = []
        # A missing directory is reported for the device. A link that root made may be on the way.
        with contextlib.suppress(OSError):
            way.extend(path_walk.steps(root.path, stack))
        check_parents(root, way)


def _recorded(place: values.Place) -> tuple[values.DirectoryIdentity, ...]:
    """What the other roots were when the policy was loaded, without those around this one."""
    root = place.root
    return tuple(
        other.identity
        for other in place.others
        if other.identity is not None
        and other.name not in root.aliases
        and not other.contains(root.path)
    )


def _named_now(
    place: values.Place, top: int, inside: Resolve, stack: contextlib.ExitStack
) -> Iterator[values.DirectoryIdentity]:
    """What has the names of the roots in this one now.

    Held: where inodes have no lasting number, one that is open keeps it.
    """
    for other in place.others:
        if place.root.contains(other.path):
            below = posixpath.relpath(other.path, place.root.path)
            try:
                fd = openat2(top, below, flags=os.O_PATH | os.O_DIRECTORY, resolve=inside)
            except OSError as error:
                if error.errno not in _CANT_BE_MET:
                    raise
                continue
            stack.callback(os.close, fd)
            yield directory_identity.of(fd)


def _refuse_others(
    fd: int, status: os.stat_result, met: tuple[values.DirectoryIdentity, ...]
) -> None:
    """Refuse to go on in a directory that is another root.

    Raises:
        OSError: EXDEV, it is one.
    """
    if not stat.S_ISDIR(status.st_mode) or status.st_ino not in {other.inode for other in met}:
        return
    here = directory_identity.of(fd)
    if any(here.is_same(other) for other in met):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
