"""The rights with which the job uses the file system: the daemon's, or the caller's.

Fails closed: where the caller's rights can't be taken on, nothing is opened.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from convertd_core import values
from convertd_daemon.linux import fsuid
from convertd_daemon.sandbox import forking

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from convertd_daemon.sandbox import spawn


@contextlib.contextmanager
def acting_for(root: values.Root, peer: values.Peer) -> Iterator[None]:
    """Take on the rights with which a root's files are opened and created.

    For `access = "caller"` these are the caller's uid, gid and groups as the kernel told them at
    connect: with a file-system uid that is not 0 the kernel takes CAP_DAC_*, CAP_FOWNER and
    CAP_CHOWN out of the effective set until the uid is 0 again, unless the caller is root itself.
    Source: setfsuid(2), capabilities(7).
    """
    if root.access is not values.RootAccess.CALLER:
        yield
        return
    with acting_as(peer.uid, peer.gid, peer.groups):
        yield


@contextlib.contextmanager
def acting_as(uid: int, gid: int, groups: Iterable[int]) -> Iterator[None]:
    """Use another user's ids for file system calls, and restore our own afterwards."""
    parent = os.getppid()
    own_groups = os.getgroups()
    with contextlib.ExitStack() as undo:
        undo.callback(forking.die_with, parent)
        undo.callback(os.setgroups, own_groups)
        os.setgroups(sorted(groups))
        with fsuid.file_access_as(uid, gid):
            yield


def describe_rights(root: values.Root, peer: values.Peer) -> str:
    """The owner of these rights, for a message."""
    if root.access is None:
        return f"uid {os.geteuid()}"
    return "the daemon" if root.access is values.RootAccess.DAEMON else f"uid {peer.uid}"


def can_read(identity: spawn.Identity, fd: int) -> bool:
    """Whether the kernel would let `identity`, without any capability, open an inode for reading.

    Asked by opening it: only the kernel knows modes, ACLs and what a file system adds to them.
    """
    return _can_open(identity, fd, os.O_RDONLY)


def can_write(identity: spawn.Identity, fd: int) -> bool:
    """Whether it would let `identity` open an inode for reading and writing. See can_read."""
    return _can_open(identity, fd, os.O_RDWR)


def _can_open(identity: spawn.Identity, fd: int, flags: int) -> bool:
    try:
        with acting_as(identity.uid, identity.gid, identity.groups):
            os.close(os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_CLOEXEC))
    except PermissionError:
        return False
    return True
