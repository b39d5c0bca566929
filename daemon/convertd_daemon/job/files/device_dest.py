"""A block device as the destination: found, checked, written from its first byte to its last.

Nothing is ever created in a root of devices: a volume that has vanished must not become a file that
fills /dev. There is no temporary to publish either: what is being written is the device itself, so
a conversion that fails once it has begun leaves it with undefined content, and says so.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convertd_core import conditions, values
from convertd_daemon.job.files import credentials, paths
from convertd_daemon.linux import blksszget, blkzeroout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convertd_daemon.sandbox.identity import Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceDest:
    """An open device that nobody else holds. Open since before qemu-img: so fsync(2) tells all.

    `group` is what qemu-img writes it as: it has no capability that would let it otherwise.
    """

    place: values.Place
    fd: int
    size_bytes: int
    group: int | None


@contextlib.contextmanager
def open_dest(grant: values.ConvertGrant, worker: Identity | None) -> Iterator[DeviceDest]:
    """Open the device that a place names, with O_EXCL: not mounted, and held by nobody.

    Raises:
        conditions.SourceNotFound: there is no such device.
        conditions.NotAnImage: it is no block device.
        conditions.ImageInUse: it is mounted, or part of something larger, or held.
        conditions.DeviceNotWritable: qemu-img could not write it.
        conditions.Unsupported: a format other than raw was asked for.
    """
    place, dest = grant.dest, grant.request.dest
    if dest.format != "raw":
        raise conditions.Unsupported(
            what=f"{dest.format} on a device", why="only raw is written to one"
        )
    with contextlib.ExitStack() as stack:
        try:
            with credentials.acting_for(place.root, grant.peer):
                name = paths.open_beneath(place, place.below)
                stack.callback(os.close, name)
                paths.check_kind(place, os.fstat(name))
                fd = paths.reopen(name, os.O_RDWR | os.O_EXCL | os.O_NONBLOCK)
                stack.callback(os.close, fd)
        except OSError as error:
            paths.raise_for(error, place, grant.peer, conditions.SourceNotFound(path=place.path))
        group = None if worker is None else _writing_group(place, os.fstat(fd))
        size = os.lseek(fd, 0, os.SEEK_END)
        yield DeviceDest(place=place, fd=fd, size_bytes=size, group=group)


def check_size(dest: DeviceDest, plan: values.Plan) -> None:
    """Refuse an image that does not fit, before a byte is written.

    Raises:
        conditions.DeviceTooSmall: it does not.
    """
    needed = plan.source.virtual_size_bytes
    if needed > dest.size_bytes:
        raise conditions.DeviceTooSmall(
            path=dest.place.path, size_bytes=dest.size_bytes, needed_bytes=needed
        )


def finish(dest: DeviceDest, plan: values.Plan, *, is_zero: bool) -> None:
    """Zero what lies beyond the image, which qemu-img leaves as it was, and flush the device.

    Raises:
        conditions.WriteFailed: that failed.
    """
    end = plan.source.virtual_size_bytes
    try:
        if not is_zero and end < dest.size_bytes:
            _zero_from(dest, end)
        os.fsync(dest.fd)
    except OSError as error:
        problem = os.strerror(error.errno or 0)
        raise conditions.WriteFailed(path=dest.place.path, problem=problem) from error


def _zero_from(dest: DeviceDest, end: int) -> None:
    """Zero a device to its end: first the sector within which the image ends, then whole ones."""
    sector = blksszget.sector_bytes(dest.fd)
    rest = -end % sector
    os.pwrite(dest.fd, bytes(rest), end)
    if end + rest < dest.size_bytes:
        blkzeroout.blkzeroout(dest.fd, end + rest, dest.size_bytes - end - rest)


def _writing_group(place: values.Place, status: os.stat_result) -> int:
    if not status.st_mode & stat.S_IWGRP or status.st_gid == 0:
        raise conditions.DeviceNotWritable(
            path=place.path, group=status.st_gid, mode=f"0{stat.S_IMODE(status.st_mode):o}"
        )
    return status.st_gid
