"""POSIX access control lists: what a new file inherits of its directory's default one.

open(2) gives a new file the directory's default list, and takes from it what the mode that was
asked for lacks. We can't leave that to open(2), for the file's mode while it is written is another.
Source: acl(5), "Object creation and default ACLs"; fs/posix_acl.c, posix_acl_create_masq().
"""

from __future__ import annotations

import errno
import os
import struct
from typing import Final

ACCESS: Final = "system.posix_acl_access"
DEFAULT: Final = "system.posix_acl_default"

# Source: linux/posix_acl_xattr.h, linux/posix_acl.h. Little-endian on every architecture.
_HEADER: Final = struct.Struct("<I")
_ENTRY: Final = struct.Struct("<HHI")  # tag, permissions, id
_VERSION: Final = 2
_USER_OBJ, _GROUP_OBJ, _MASK, _OTHER = 0x01, 0x04, 0x10, 0x20

_NONE: Final = frozenset({errno.ENODATA, errno.EOPNOTSUPP})
"""There is no such list, or the file system has no lists."""


def default_of(directory: int) -> bytes:
    """The default list of a directory, as the kernel hands it out; empty if it has none.

    Raises:
        OSError: it has one that can't be read.
    """
    try:
        return os.getxattr(directory, DEFAULT)
    except OSError as error:
        if error.errno in _NONE:
            return b""
        raise


def remove(fd: int) -> None:
    """Take its list from a file, if it has one.

    Raises:
        OSError: it keeps it.
    """
    try:
        os.removexattr(fd, ACCESS)
    except OSError as error:
        if error.errno not in _NONE:
            raise


def inherited(default: bytes, mode: int) -> tuple[bytes, int]:
    """What open(2) with `mode` would give a file: its list, and the mode that it shows.

    No entry of the result allows more than `mode` does to its class: owner, group (which holds
    every user and group that is named), or others.

    Raises:
        OSError: EINVAL, these bytes are no list. The server of a FUSE file system chose them.
    """
    entries = _entries(default)
    # Where there is a mask it stands for the group class, and the group's own entry stays.
    group = _MASK if any(tag == _MASK for tag, _, _ in entries) else _GROUP_OBJ
    shift = {_USER_OBJ: 6, group: 3, _OTHER: 0}
    kept = [
        (tag, permissions & (mode >> shift[tag]) if tag in shift else permissions, number)
        for tag, permissions, number in entries
    ]
    shown = sum(permissions << shift[tag] for tag, permissions, _ in kept if tag in shift)
    return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in kept), shown


def _entries(acl: bytes) -> list[tuple[int, int, int]]:
    if len(acl) < _HEADER.size or _HEADER.unpack_from(acl) != (_VERSION,):
        raise OSError(errno.EINVAL, "an access control list of an unknown version")
    try:
        return list(_ENTRY.iter_unpack(acl[_HEADER.size :]))
    except struct.error as error:
        raise OSError(errno.EINVAL, "an access control list of an odd length") from error
