"""POSIX access control lists: what a new file inherits of its directory's default one.

open(2) gives a new file the directory's default list, and takes from it what the mode that was
asked for lacks. We can't leave that to open(2), for the file's mode while it is written is another.
Source: acl(5), "Object creation and default ACLs"; fs/posix_acl.c, posix_acl_create_masq().
"""

from __future__ import annotations

import os

from convertd_daemon.linux import posix_acl


def default_of(directory: int) -> bytes:
    """The default list of a directory, as the kernel hands it out; empty if it has none.

    Raises:
        OSError: it has one that can't be read.
    """
    return posix_acl.read(directory, posix_acl.DEFAULT)


def remove(fd: int) -> None:
    """Take its list from a file, if it has one.

    Raises:
        OSError: it keeps it.
    """
    try:
        os.removexattr(fd, posix_acl.ACCESS)
    except OSError as error:
        if error.errno not in posix_acl.WITHOUT:
            raise


def inherited(default: bytes, mode: int) -> tuple[bytes, int]:
    """What open(2) with `mode` would give a file: its list, and the mode that it shows.

    No entry of the result allows more than `mode` does to its class: owner, group (which holds
    every user and group that is named), or others.

    Raises:
        OSError: EINVAL, these bytes are no list. The server of a FUSE file system chose them.
    """
    entries = posix_acl.unpack(default)
    # Where there is a mask it stands for the group class, and the group's own entry stays.
    has_mask = any(tag == posix_acl.MASK for tag, _, _ in entries)
    group = posix_acl.MASK if has_mask else posix_acl.GROUP_OBJ
    shift = {posix_acl.USER_OBJ: 6, group: 3, posix_acl.OTHER: 0}
    kept = [
        (tag, permissions & (mode >> shift[tag]) if tag in shift else permissions, number)
        for tag, permissions, number in entries
    ]
    shown = sum(permissions << shift[tag] for tag, permissions, _ in kept if tag in shift)
    return posix_acl.pack(kept), shown
