"""Whether the destination's file system has room, and the message when it has not."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from convertd_core import conditions

if TYPE_CHECKING:
    from convertd_daemon.job.files.paths import Target


def check(target: Target, needed_bytes: int) -> None:
    """Refuse a conversion that the file system can't hold as it is now.

    One that has no size, as ramfs, doesn't tell; there the conversion is tried.

    Raises:
        conditions.NoSpace: `needed_bytes` are more than are free for us.
    """
    has_a_size = os.fstatvfs(target.directory).f_blocks > 0
    if has_a_size and needed_bytes > free_bytes(target):
        raise no_space(target, needed_bytes)


def free_bytes(target: Target) -> int:
    """What an unprivileged user could still write there."""
    status = os.fstatvfs(target.directory)
    return status.f_bavail * status.f_frsize


def no_space(target: Target, needed_bytes: int) -> conditions.NoSpace:
    """The condition, with the numbers of this moment."""
    return conditions.NoSpace(
        path=target.place.path,
        mount_point=mount_point(target),
        needed_bytes=needed_bytes,
        free_bytes=free_bytes(target),
    )


def ran_out(target: Target, result: int, expected_bytes: int) -> conditions.NoSpace:
    """The condition for a file system that this result filled; the result still exists.

    What it has to give is what the result took and what is left; what the result needs is more than
    that, by a block at least, and no less than what was expected of it.
    """
    room_bytes = os.fstat(result).st_blocks * 512 + free_bytes(target)
    more_bytes = room_bytes + os.fstatvfs(target.directory).f_frsize
    return conditions.NoSpace(
        path=target.place.path,
        mount_point=mount_point(target),
        needed_bytes=max(expected_bytes, more_bytes),
        free_bytes=room_bytes,
    )


def raise_if_full(error: OSError, target: Target) -> None:
    """Raise the condition that a full file system or a spent quota is, if that is the error."""
    if error.errno == errno.ENOSPC:
        raise no_space(target, os.fstat(target.directory).st_blksize) from error
    if error.errno == errno.EDQUOT:
        raise conditions.QuotaExceeded(path=target.place.path) from error


def mount_point(target: Target) -> str:
    """The mount point under which the destination lies.

    The longest that contains the path as written; the mount table was opened before the sandbox
    closed /proc. Source: proc_pid_mountinfo(5).
    """
    path = target.place.path
    with open(target.mount_table, closefd=False, errors="surrogateescape") as table:
        table.seek(0)
        points = [_unescape(line.split(" ")[4]) for line in table]
    holding = (point for point in points if f"{path}/".startswith(f"{point.rstrip('/')}/"))
    return max(holding, key=len, default="/")


def _unescape(field: str) -> str:
    """Undo the octal escapes of mountinfo: blank, tab, newline, backslash."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field
