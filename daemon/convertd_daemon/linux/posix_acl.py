"""acl(5): who may write an inode by its access control list."""

import errno
import os
import struct
from dataclasses import dataclass
from typing import Final

# Source: linux/posix_acl_xattr.h: a version, then entries of tag, permissions and id.
_NAME: Final = "system.posix_acl_access"
_HEADER: Final = struct.Struct("<I")
_ENTRY: Final = struct.Struct("<HHI")
_VERSION: Final = 2
_WRITE: Final = 0x2
_USER: Final = 0x02
_GROUP_OBJ: Final = 0x04
_GROUP: Final = 0x08

_WITHOUT: Final = frozenset({errno.ENODATA, errno.EOPNOTSUPP})


@dataclass(frozen=True, slots=True, kw_only=True)
class Writers:
    """The named users and groups with write permission, and whether the owning group has it.

    The mask is not applied: the group bits of the mode hold it.
    """

    uids: frozenset[int]
    gids: frozenset[int]
    owning_group: bool


def writers(fd: int) -> Writers | None:
    """Read an inode's list; None if it has none. The descriptor may be O_PATH.

    Raises:
        OSError: as getxattr(2); EINVAL for a malformed list.
    """
    try:
        # fgetxattr(2) refuses an O_PATH descriptor.
        data = os.getxattr(f"/proc/self/fd/{fd}", _NAME)
    except OSError as error:
        if error.errno in _WITHOUT:
            return None
        raise
    if data[: _HEADER.size] != _HEADER.pack(_VERSION) or (len(data) - _HEADER.size) % _ENTRY.size:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), _NAME)
    entries = list(_ENTRY.iter_unpack(data[_HEADER.size :]))
    named = {
        kind: frozenset(number for tag, bits, number in entries if tag == kind and bits & _WRITE)
        for kind in (_USER, _GROUP)
    }
    owning = any(tag == _GROUP_OBJ and bits & _WRITE for tag, bits, _ in entries)
    return Writers(uids=named[_USER], gids=named[_GROUP], owning_group=owning)
