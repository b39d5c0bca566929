"""The file that is being written, before it has a name.

An inode opened with O_TMPFILE is in no directory: nobody can see it half-written, and the kernel
frees it when its last descriptor closes, however that comes about. Where a file system has no
O_TMPFILE (NFS, FUSE) a named temporary stands in, locked with flock(2) for as long as its job
lives; whoever makes the next one in that directory removes those that nobody locks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

from convertd_daemon import errors, model
from convertd_daemon.job import alias, paths, rights, space
from convertd_daemon.kernel import getrandom

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convertd_daemon.job.paths import Target
    from convertd_daemon.sandbox.identity import Identity
    from convertd_daemon.sandbox.setup import Setup

WITHOUT_TMPFILE: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOSYS, errno.EINVAL})
"""What open(2) says of O_TMPFILE where kernel or file system lacks it."""

FOR_THE_WORKER: Final = 0o060
"""The mode while qemu-img writes. Its group may; and what it does not own it can't chmod."""

_ACL: Final = "system.posix_acl_access"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ownership:
    """Whose the result is in the end, and its mode. A gid of -1 leaves the group as it is."""

    uid: int
    gid: int
    mode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDest:
    """The inode being written, open for reading and writing since before qemu-img started.

    Only such a descriptor hears of every write that failed: an error of writeback is told to the
    descriptors that were open at the time. Source: fsync(2), Linux errseq_t.

    `target` is where it will appear, `temporary` its name for the time being, empty if it has none.
    `alias` is a path to the descriptor with the right last name, for a format that writes it down.
    """

    target: Target
    fd: int
    temporary: str
    ownership: Ownership
    alias: str = ""

    @property
    def place(self) -> model.Place:
        """Where it will appear, as the caller named it."""
        return self.target.place


@contextlib.contextmanager
def create(grant: model.Grant, target: Target, setup: Setup) -> Iterator[FileDest]:
    """Make the inode in the directory where it will be published, so that the worker can write it.

    When the block is left the inode goes, unless it was given a name.

    Raises:
        errors.AccessRefused, errors.ReadOnlyFileSystem, errors.NoSpace, errors.QuotaExceeded,
        errors.BadOption, errors.Unsupported, errors.WriteFailed: as they say.
    """
    ownership = _ownership(grant, target)
    with contextlib.ExitStack() as stack:
        try:
            with rights.of(target.place.root, grant.peer):
                fd, temporary = _open_new(target)
            stack.callback(os.close, fd)
            if temporary:
                stack.callback(_unlink, grant, target, temporary)
            # Whoever sweeps this directory for left-overs takes this lock first; see publish.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if setup.identity is not None:
                _open_to(setup.identity, fd, ownership.uid)
            path = ""
            if grant.request.dest.format in alias.FORMATS_THAT_NAME_THEMSELVES:
                path = stack.enter_context(alias.made(setup.names, target.name, fd))
        except OSError as error:
            _raise_for(error, grant, target)
        yield FileDest(target=target, fd=fd, temporary=temporary, ownership=ownership, alias=path)


def sweep(target: Target) -> None:
    """Remove the named temporaries of jobs that no longer live."""
    for name in os.listdir(target.directory):
        if name.startswith(".convertd-") and name.endswith(".tmp"):
            with contextlib.suppress(OSError):
                _remove_if_unlocked(target.directory, name)


def temporary_name() -> str:
    """A name for the moment, which only we would choose and nobody can guess."""
    return f".convertd-{getrandom.hex_name(8)}.tmp"


def _open_new(target: Target) -> tuple[int, str]:
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=target.directory), ""
    except OSError as error:
        if error.errno not in WITHOUT_TMPFILE:
            raise
    sweep(target)
    name = temporary_name()
    create_flags = flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    return os.open(name, create_flags, 0o600, dir_fd=target.directory), name


def _remove_if_unlocked(directory: int, name: str) -> None:
    with contextlib.ExitStack() as stack:
        found = paths.look_up(directory, name)
        stack.callback(os.close, found)
        if stat.S_ISREG(os.fstat(found).st_mode):
            fd = paths.reopen(found, os.O_RDONLY | os.O_NONBLOCK)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(name, dir_fd=directory)


def _unlink(grant: model.Grant, target: Target, name: str) -> None:
    """Remove a named temporary, unless publishing already has."""
    with contextlib.suppress(FileNotFoundError), rights.of(target.place.root, grant.peer):
        os.unlink(name, dir_fd=target.directory)


def _open_to(worker: Identity, fd: int, owner: int) -> None:
    """Let the worker's group write the inode, which is its owner's from the first byte."""
    # A default ACL of the directory would mask the group's bits.
    with contextlib.suppress(OSError):
        os.removexattr(fd, _ACL)
    os.fchown(fd, owner, worker.gid)
    os.fchmod(fd, FOR_THE_WORKER)


def _ownership(grant: model.Grant, target: Target) -> Ownership:
    root, dest, peer = target.place.root, grant.request.dest, grant.peer
    mode = root.mode if dest.mode is None else dest.mode
    if dest.group:
        gid = _group_of(peer, dest.group)
    elif target.setgid_group is not None:
        gid = target.setgid_group
    elif root.access is model.Access.OWN:
        gid = -1
    else:
        gid = root.owner.gid if root.owner else peer.gid
    uid = root.owner.uid if root.owner else peer.uid
    return Ownership(uid=uid, gid=gid, mode=mode)


def _group_of(peer: model.Peer, name: str) -> int:
    """The gid of a group that the caller is in: it could chgrp to no other itself."""
    problem = f"{name!r} is not a group of yours"
    try:
        gid = int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise errors.BadOption(field="dest.group", problem=problem) from error
    if gid not in {peer.gid, *peer.groups}:
        raise errors.BadOption(field="dest.group", problem=problem)
    return gid


def _raise_for(error: OSError, grant: model.Grant, target: Target) -> NoReturn:
    path = target.place.path
    space.raise_if_full(error, target)
    match error.errno:
        case errno.EACCES | errno.EPERM:
            whose = rights.name_of(target.place.root, grant.peer)
            raise errors.AccessRefused(path=path, rights=whose) from error
        case errno.EROFS:
            raise errors.ReadOnlyFileSystem(path=path) from error
        case errno.EOPNOTSUPP:
            why = "its file system can't give a file to another owner"
            raise errors.Unsupported(what=path, why=why) from error
    raise errors.WriteFailed(path=path, problem=os.strerror(error.errno or 0)) from error
