"""Owner and mode of a result: while it is written, and in the end. Fails closed.

The status of fchown(2) and fchmod(2) is not trusted: ntfs-3g returns 0, and the file stays root's
with mode 0777. So fstat(2) is called afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from convertd_core import conditions, results, values
from convertd_daemon.job.files import acl, credentials
from convertd_daemon.linux import posix_acl

if TYPE_CHECKING:
    from convertd_daemon.job.files.paths import Target
    from convertd_daemon.sandbox.identity import Identity

FOR_THE_WORKER: Final = 0o060
"""The mode while qemu-img writes. Its group may; and what it does not own it can't chmod."""

_NOT_HERE: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL, errno.EOVERFLOW})
"""The errors of a file system that has no owners, or not this one. Source: chown(2),
fs/fat/file.c."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ownership:
    """The owner and the mode of the result in the end. A gid of -1 leaves the group as it is.

    `acl` is its access control list, empty if it has none; the mode is then what that shows.
    """

    uid: int
    gid: int
    mode: int
    acl: bytes = b""

    def __str__(self) -> str:
        group = "" if self.gid == -1 else f"gid {self.gid}, "
        return f"uid {self.uid}, {group}mode {self.mode:04o}"


def wanted(grant: values.ConvertGrant, target: Target) -> Ownership:
    """The owner and mode that a result will have: of the request, the directory or the root.

    A default access control list of the directory is inherited, as open(2) would.

    Raises:
        conditions.BadOption: the caller is not in the group that it asks for.
        OSError: the directory's list can't be read.
    """
    root, dest, peer = target.place.root, grant.request.dest, grant.peer
    mode = root.mode if dest.mode is None else dest.mode
    if dest.group:
        gid = _group_of(peer, dest.group)
    elif target.setgid_group is not None:
        gid = target.setgid_group
    elif root.access is None:
        gid = -1
    else:
        gid = root.owner.gid if root.owner else peer.gid
    uid = root.owner.uid if root.owner else peer.uid
    if not (default := acl.default_of(target.directory)):
        return Ownership(uid=uid, gid=gid, mode=mode)
    inherited, shown = acl.inherited(default, mode)
    return Ownership(uid=uid, gid=gid, mode=shown, acl=inherited)


def open_to(
    worker: Identity, fd: int, final: Ownership, target: Target
) -> tuple[results.Warning, ...]:
    """Let the worker's group write the inode, which is its owner's from the first byte.

    Gives the warning that the result will have if the file system keeps another owner or mode.

    Raises:
        conditions.OwnerNotKept: the file system does not give it to them, and the root requires
            that.
        conditions.Unsupported: nor could the worker write it.
        OSError: the kernel refuses.
    """
    # A list that it inherited would let others read what is being written.
    acl.remove(fd)
    now = Ownership(uid=final.uid, gid=worker.gid, mode=FOR_THE_WORKER)
    with _refused_here():
        os.fchown(fd, now.uid, now.gid)
        os.fchmod(fd, now.mode)
    found = _found(fd)
    if _is_kept(found, now):
        return ()
    _refuse_unless_allowed(target, found, final)
    if not credentials.can_write(worker, fd):
        why = f"its file system does not let qemu-img's uid {worker.uid} write it"
        raise conditions.Unsupported(what=target.place.path, why=why)
    return (_warning(found, final),)


def settle(fd: int, final: Ownership, target: Target) -> tuple[results.Warning, ...]:
    """Give the inode the mode and the owner that it keeps; tell if the file system keeps others.

    Raises:
        conditions.OwnerNotKept: it keeps others, and the root requires these.
        OSError: the kernel refuses.
    """
    with _refused_here():
        if final.acl:
            os.setxattr(fd, posix_acl.ACCESS, final.acl)
        else:
            os.fchmod(fd, final.mode)
        status = os.fstat(fd)
        if (final.uid, final.gid) not in {(status.st_uid, status.st_gid), (status.st_uid, -1)}:
            os.fchown(fd, final.uid, final.gid)
    found = _found(fd)
    if _is_kept(found, final):
        return ()
    _refuse_unless_allowed(target, found, final)
    return (_warning(found, final),)


def _warning(found: Ownership, final: Ownership) -> results.Warning:
    message = f"the file system does not keep owner and mode: the result is {found}, not {final}"
    return results.Warning(reason="OWNER_NOT_KEPT", message=message)


@contextlib.contextmanager
def _refused_here() -> Iterator[None]:
    """Ignore the errors of a file system without owners: the result is checked afterwards."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise


def _found(fd: int) -> Ownership:
    status = os.fstat(fd)
    return Ownership(uid=status.st_uid, gid=status.st_gid, mode=stat.S_IMODE(status.st_mode))


def _is_kept(found: Ownership, asked: Ownership) -> bool:
    gid = found.gid if asked.gid == -1 else asked.gid
    return (found.uid, found.gid, found.mode) == (asked.uid, gid, asked.mode)


def _refuse_unless_allowed(target: Target, found: Ownership, final: Ownership) -> None:
    if not target.place.root.allow_ownerless:
        path = target.place.path
        raise conditions.OwnerNotKept(path=path, found=str(found), wanted=str(final))


def _group_of(peer: values.Peer, name: str) -> int:
    """The gid of a group that the caller is in: it could chgrp to no other itself."""
    problem = f"{name!r} is not a group of yours"
    try:
        gid = int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise conditions.BadOption(field="dest.group", problem=problem) from error
    if gid not in {peer.gid, *peer.groups}:
        raise conditions.BadOption(field="dest.group", problem=problem)
    return gid
