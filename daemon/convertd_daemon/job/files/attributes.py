"""What chattr(1) forbids, asked before anything is written: append-only and immutable.

The kernel holds root to them too. In an append-only directory a name can be made, and neither be
renamed nor removed: a temporary would stay there. Source: ioctl_iflags(2), fs/namei.c may_delete().
"""

from __future__ import annotations

import errno
from typing import Final

from convertd_core import conditions
from convertd_daemon.linux import statx
from convertd_daemon.linux.statx import Attribute

_NAMES: Final = {Attribute.IMMUTABLE: "immutable", Attribute.APPEND: "append-only"}


def check_directory(fd: int, path: str, *, renames: bool) -> None:
    """Refuse a directory in which the result can't get its name.

    `renames` says that a name has to be taken away for that, and not only made.

    Raises:
        conditions.ProtectedByAttribute: it is immutable, or append-only and `renames`.
        OSError: it can't be asked.
    """
    _refuse(fd, path, Attribute.IMMUTABLE | (Attribute.APPEND if renames else Attribute(0)))


def check_file(fd: int, path: str) -> None:
    """Refuse a file that can't be replaced. The descriptor may be open with O_PATH.

    Raises:
        conditions.ProtectedByAttribute: it is immutable or append-only.
        OSError: it can't be asked.
    """
    _refuse(fd, path, Attribute.IMMUTABLE | Attribute.APPEND)


def _attributes(fd: int) -> Attribute:
    try:
        return statx.attributes(fd)
    except OSError as error:
        # Refused by a container's filter: what forbids it then is the kernel, at the end.
        if error.errno != errno.ENOSYS:
            raise
        return Attribute(0)


def _refuse(fd: int, path: str, forbidden: Attribute) -> None:
    if found := _attributes(fd) & forbidden:
        names = [name for attribute, name in _NAMES.items() if attribute in found]
        raise conditions.ProtectedByAttribute(path=path, attribute=" and ".join(names))
