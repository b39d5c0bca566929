"""acl(5): access control lists, as extended attributes hold them."""

import errno
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

ACCESS: Final = "system.posix_acl_access"
DEFAULT: Final = "system.posix_acl_default"

# Source: linux/posix_acl.h.
USER_OBJ: Final = 0x01
USER: Final = 0x02
GROUP_OBJ: Final = 0x04
GROUP: Final = 0x08
MASK: Final = 0x10
OTHER: Final = 0x20

# Source: linux/posix_acl_xattr.h. Little-endian on every architecture.
_HEADER: Final = struct.Struct("<I")
_ENTRY: Final = struct.Struct("<HHI")
_VERSION: Final = 2
_WRITE: Final = 0x2

WITHOUT: Final = frozenset({errno.ENODATA, errno.EOPNOTSUPP})
"""The inode has no such list, or its file system has no lists."""

Entry = tuple[int, int, int]
"""A tag, permissions, and the id of a named user or group."""


def read(fd: int, name: str = ACCESS) -> bytes:
    """Read an inode's list; empty if it has none. The descriptor may be O_PATH.

    Raises:
        OSError: as getxattr(2).
    """
    try:
        # fgetxattr(2) refuses an O_PATH descriptor.
        return os.getxattr(f"/proc/self/fd/{fd}", name)
    except OSError as error:
        if error.errno in WITHOUT:
            return b""
        raise


def unpack(data: bytes) -> list[Entry]:
    """Give the entries of a list.

    Raises:
        OSError: EINVAL, these bytes are no list. The server of a FUSE file system may choose them.
    """
    if data[: _HEADER.size] != _HEADER.pack(_VERSION) or (len(data) - _HEADER.size) % _ENTRY.size:
        raise OSError(errno.EINVAL, "not an access control list")
    return list(_ENTRY.iter_unpack(data[_HEADER.size :]))


def pack(entries: Iterable[Entry]) -> bytes:
    """Make a list of entries."""
    return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class Writers:
    """The named users and groups with write permission, and whether the owning group has it.

    The mask is not applied: the group bits of the mode hold it.
    """

    uids: frozenset[int]
    gids: frozenset[int]
    owning_group: bool


def writers(fd: int) -> Writers | None:
    """Who may write an inode by its list; None if it has none. The descriptor may be O_PATH.

    Raises:
        OSError: as getxattr(2); EINVAL for a malformed list.
    """
    data = read(fd)
    if not data:
        return None
    may = [(tag, number) for tag, permissions, number in unpack(data) if permissions & _WRITE]
    named = {
        kind: frozenset(number for tag, number in may if tag == kind)
        for kind in (USER, GROUP_OBJ, GROUP)
    }
    return Writers(uids=named[USER], gids=named[GROUP], owning_group=bool(named[GROUP_OBJ]))
