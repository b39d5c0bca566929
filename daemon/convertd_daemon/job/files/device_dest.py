"""A block device as the destination: found, checked, written from its first byte to its last.

Nothing is ever created in a root of devices: a volume that has vanished must not become a file that
fills /dev. There is no temporary to publish either: what is being written is the device itself, so
a conversion that fails once it has begun leaves it with undefined content, and says so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convertd_core import conditions, results, validation, values
from convertd_daemon.job import stages
from convertd_daemon.job.files import credentials, direct_io, paths
from convertd_daemon.job.qemu import execution
from convertd_daemon.linux import ioctl
from convertd_daemon.sandbox import landlock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convertd_daemon.sandbox.identity import Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceDest:
    """An open device that no other process holds. See destination.Destination.

    `group` is the group with which qemu-img writes it: it has no capability that would let it
    otherwise. `is_zero` is the caller's claim that the device reads as zeroes.
    """

    place: values.Place
    fd: int
    size_bytes: int
    group: int | None
    is_zero: bool = False

    @property
    def on_device(self) -> bool:
        """A device is written in place."""
        return True

    @property
    def alias(self) -> str:
        """None: raw, the only format on a device, stores no name."""
        return ""

    @property
    def expected_warnings(self) -> tuple[results.Warning, ...]:
        """None: a device keeps its owner."""
        return ()

    @property
    def undefined_on_failure(self) -> str:
        """The device itself."""
        return self.place.path

    def inodes(self) -> execution.Inodes:
        """The device, with its group."""
        groups = () if self.group is None else (self.group,)
        return execution.Inodes(devices=(self.fd,), groups=groups)

    def rules(self) -> tuple[landlock.Rule, ...]:
        """Write the device."""
        return (landlock.Rule(where=self.fd, access=landlock.DEVICE),)

    def direct_refusal(self) -> str | None:
        """Ask the kernel by reading: a write would change the device."""
        return direct_io.read_refusal(self.fd)

    def write_rates(
        self, _grant: values.ConvertGrant, _plan: stages.ConversionPlan, /
    ) -> stages.WriteRates | None:
        """None: a trial would change the device. Direct writes to one don't wait for each other."""
        return None

    def available_bytes(self) -> int:
        """The device's size."""
        return self.size_bytes

    def check_room(self, plan: stages.ConversionPlan, source: int, /) -> None:
        """Hold the image's virtual size against the device's, and the device against the source.

        What lies under the source was opened after this device, which is held: see open_source.
        """
        # st_rdev is 0 for a source that is a file.
        if os.fstat(source).st_rdev == os.fstat(self.fd).st_rdev:
            path = validation.shown(self.place.path)
            raise conditions.BadPath(field="dest.path", path=path, problem="is the source")
        needed = plan.virtual_size_bytes
        if needed > self.size_bytes:
            raise conditions.DeviceTooSmall(
                path=self.place.path, size_bytes=self.size_bytes, needed_bytes=needed
            )

    def no_space(self, _needed_bytes: int, /) -> conditions.ConvertError:
        """A thin device whose pool is full, or one that lied about its size."""
        return conditions.WriteFailed(path=self.place.path, problem=os.strerror(errno.ENOSPC))

    def flush(self, plan: stages.ConversionPlan, /) -> tuple[results.Warning, ...]:
        """Zero what lies beyond the image, which qemu-img leaves as it was, and fsync."""
        end = plan.virtual_size_bytes
        try:
            if not self.is_zero and end < self.size_bytes:
                _zero_from(self, end)
            os.fsync(self.fd)
        except OSError as error:
            problem = os.strerror(error.errno or 0)
            raise conditions.WriteFailed(path=self.place.path, problem=problem) from error
        return ()

    def assign_name(self, _grant: values.ConvertGrant, /) -> bool:
        """Nothing to do: a device has its name, and was there before."""
        return True


@contextlib.contextmanager
def open_dest(grant: values.ConvertGrant, worker: Identity | None) -> Iterator[DeviceDest]:
    """Open the device that a place names, with O_EXCL: not mounted, and held by no other process.

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
            what=f"{dest.format} on a device", why="a device can hold only raw"
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
        yield DeviceDest(place=place, fd=fd, size_bytes=size, group=group, is_zero=dest.is_zero)


def _zero_from(dest: DeviceDest, end: int) -> None:
    """Zero a device to its end: first the sector within which the image ends, then whole ones."""
    sector = ioctl.blksszget(dest.fd)
    rest = -end % sector
    os.pwrite(dest.fd, bytes(rest), end)
    if end + rest < dest.size_bytes:
        ioctl.blkzeroout(dest.fd, end + rest, dest.size_bytes - end - rest)


def _writing_group(place: values.Place, status: os.stat_result) -> int:
    if not status.st_mode & stat.S_IWGRP or status.st_gid == 0:
        raise conditions.DeviceNotWritable(
            path=place.path, group=status.st_gid, mode=f"0{stat.S_IMODE(status.st_mode):o}"
        )
    return status.st_gid
