"""Walk from `/` to a directory, one name at a time, and judge who could replace what is there.

Fails closed. Each directory is opened below the one before and stays open, so that the directory
that was judged is the one that is used. No link is followed; `followed` gives each one, as a step.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from convertd_daemon.linux import fstatfs, posix_acl, statx
from convertd_daemon.linux.openat2 import Resolve, openat2

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Iterator

    from convertd_core import values

STRICTLY: Final = Resolve.NO_SYMLINKS | Resolve.NO_MAGICLINKS

MOST_LINKS: Final = 40
"""As the kernel's MAXSYMLINKS. Source: linux/namei.h."""

KEEP_BIRTHS: Final = frozenset(fstatfs.Magic)
"""Where an inode has one time of birth for as long as it lives, which no user can set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A directory on the way, open with O_PATH for as long as the walk's stack lasts."""

    path: str
    fd: int
    status: os.stat_result


@dataclass(frozen=True, slots=True, kw_only=True)
class Writers:
    """The users, other than root, who can replace what is in a directory."""

    path: str
    uids: frozenset[int] = frozenset()
    gids: frozenset[int] = frozenset()
    everybody: bool = False
    is_sticky: bool = False

    def __bool__(self) -> bool:
        return self.everybody or bool(self.uids or self.gids)

    def beyond(self, root: values.Root) -> Writers:
        """Those of them whom the policy does not name for that root."""
        return Writers(
            path=self.path,
            uids=self.uids - root.parent_uids,
            gids=self.gids - root.parent_gids,
            everybody=self.everybody,
            is_sticky=self.is_sticky,
        )

    def __str__(self) -> str:
        named = [f"uid {uid}" for uid in sorted(self.uids)]
        named += [f"members of gid {gid}" for gid in sorted(self.gids)]
        return " and ".join(["everybody"] if self.everybody else named)


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


def problem_of(path: str, status: os.stat_result, *, sticky_will_do: bool = False) -> str:
    """Say why a user other than root could change a file or directory; empty if none could.

    In a sticky directory of root's no other user can rename or remove what is root's: that will do
    for a file that we create and check afterwards. Write permission by an access control list shows
    in the group's bits too. Source: acl(5).
    """
    if status.st_uid != 0:
        return f"{path} belongs to uid {status.st_uid}, not to root"
    if sticky_will_do and status.st_mode & stat.S_ISVTX:
        return ""
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        return f"{path} can be written by others than root (mode {mode:04o})"
    return ""


def identity_of(fd: int, status: os.stat_result) -> values.DirectoryIdentity:
    """Which directory a descriptor leads to.

    Raises:
        OSError: the kernel's own answer.
    """
    from convertd_core import values  # noqa: PLC0415 - the front starts before that is loaded

    return values.DirectoryIdentity(
        device=status.st_dev,
        inode=status.st_ino,
        born_ns=statx.birth_ns(fd),
        keeps_birth=fstatfs.magic(fd) in KEEP_BIRTHS,
    )


def writers_above(path: str, kind: values.RootKind, way: list[Step]) -> Iterator[Writers]:
    """Say of each directory on the way to a root who could replace what lies next on the way.

    `way` may end before the root, if that is not there: then those count who could make what is
    missing. In a root of devices, where links are followed, those count who can write in it.

    Raises:
        OSError: an access control list could not be read.
    """
    from convertd_core import values  # noqa: PLC0415 - the front starts before that is loaded

    links_count = kind is values.RootKind.BLOCK
    for number, step in enumerate(way):
        below = way[number + 1].status if number + 1 < len(way) else None
        if below is not None or step.path != path or links_count:
            yield writers(step, below)


def writers(step: Step, below: os.stat_result | None) -> Writers:
    """Who could replace `below` in a directory, or make it where it is missing, or write a file.

    An owner can give itself every permission. In a sticky directory only its owner, and the owner
    of what is in it, can rename that. Source: inode(7), unlink(2).

    Raises:
        OSError: an access control list could not be read.
    """
    mode = step.status.st_mode
    uids, gids = {step.status.st_uid}, set[int]()
    everybody = False
    if below is not None and mode & stat.S_ISVTX:
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            uids.add(below.st_uid)
    else:
        everybody = bool(mode & stat.S_IWOTH)
        if mode & stat.S_IWGRP:
            # With a list these bits are its mask: nobody it names may do more.
            listed = posix_acl.writers(step.fd)
            if listed is None or listed.owning_group:
                gids.add(step.status.st_gid)
            if listed is not None:
                uids |= listed.uids
                gids |= listed.gids
    return Writers(
        path=step.path,
        uids=frozenset(uids - {0}),
        gids=frozenset(gids),
        everybody=everybody,
        is_sticky=bool(mode & stat.S_ISVTX),
    )
