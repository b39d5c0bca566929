"""The two ends of a conversion, open."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convertd_core import conditions, validation, values
from convertd_daemon.job.files import (
    device_dest,
    direct_io,
    file_dest,
    name_alias,
    page_cache,
    paths,
    space,
)
from convertd_daemon.job.qemu import execution, plan
from convertd_daemon.sandbox import landlock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convertd_daemon.job import context
    from convertd_daemon.job.qemu.backing_chain import ChainLink
    from convertd_daemon.sandbox.setup import Setup

Dest = file_dest.FileDest | device_dest.DeviceDest


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """What is read, the source and all it stands on, and what is written."""

    chain: tuple[ChainLink, ...]
    dest: Dest

    @property
    def source(self) -> paths.Source:
        """The source itself."""
        return self.chain[0].source

    @property
    def sources(self) -> tuple[paths.Source, ...]:
        """The files of the chain, the source itself first."""
        return tuple(link.source for link in self.chain)

    @property
    def members(self) -> tuple[values.ChainMember, ...]:
        """The chain, without its descriptors."""
        return tuple(link.member for link in self.chain)

    def inodes(self, pipes: tuple[int, ...] = ()) -> execution.Inodes:
        """What qemu-img may touch to convert."""
        read = tuple(link.source.fd for link in self.chain)
        if isinstance(self.dest, device_dest.DeviceDest):
            groups = () if self.dest.group is None else (self.dest.group,)
            return execution.Inodes(read=read, devices=(self.dest.fd,), pipes=pipes, groups=groups)
        return execution.Inodes(read=read, write=(self.dest.fd,), pipes=pipes)

    def nodes(self) -> tuple[plan.Node, ...]:
        """The chain as the plan speaks of it."""
        return tuple(
            plan.Node(
                format=link.info.format,
                fd=link.source.fd,
                on_device=link.source.place.root.kind is values.RootKind.BLOCK,
            )
            for link in self.chain
        )

    def dest_node(self, image_format: str) -> plan.Node:
        """The destination as the plan speaks of it."""
        on_device = isinstance(self.dest, device_dest.DeviceDest)
        alias_path = "" if isinstance(self.dest, device_dest.DeviceDest) else self.dest.alias
        return plan.Node(
            format=image_format, fd=self.dest.fd, on_device=on_device, alias=alias_path
        )

    def try_out(self, image_format: str) -> plan.Facts:
        """Find out what can only be known by trying. Once, while the destination is empty."""
        refusals = (direct_io.read_refusal(link.source.fd) for link in self.chain)
        return plan.Facts(
            chain=self.nodes(),
            dest=self.dest_node(image_format),
            source_direct=next((refusal for refusal in refusals if refusal), None),
            dest_direct=dest_refusal(self.dest),
            available_bytes=available_bytes(self.dest),
            in_memory=all(page_cache.is_in_memory(link.source.fd) for link in self.chain),
        )

    def rules(self) -> tuple[landlock.Rule, ...]:
        """What the job itself keeps of the file system."""
        read = tuple(
            landlock.Rule(where=link.source.fd, access=landlock.READ) for link in self.chain
        )
        return (*read, *rules_of(self.dest))


def open_dest(grant: values.ConvertGrant, setup: Setup) -> contextlib.AbstractContextManager[Dest]:
    """Open what will be written: a device, or an inode that has no name yet.

    Raises:
        conditions.ConvertError: as devices.open_dest, paths.open_target and result.create say.
    """
    if grant.dest.root.kind is values.RootKind.BLOCK:
        return device_dest.open_dest(grant, setup.identity)
    return _open_file(grant, setup)


@contextlib.contextmanager
def _open_file(grant: values.ConvertGrant, setup: Setup) -> Iterator[Dest]:
    with paths.open_target(grant) as target, file_dest.create(grant, target, setup) as dest:
        yield dest


def check_room(both: Endpoints, planned: values.Plan) -> None:
    """Refuse a destination that can't hold the image as it is now, or that is the image itself.

    Raises:
        conditions.NoSpace, conditions.DeviceTooSmall: it can't.
        conditions.BadPath: it is the device that the source is on, by another name.
    """
    dest = both.dest
    if not isinstance(dest, device_dest.DeviceDest):
        space.check(dest.target, planned.needed_bytes)
        return
    # What lies under the source was opened after the destination, which is held: see open_source.
    if _device_of(both.source.fd) == _device_of(dest.fd):
        path = validation.shown(dest.place.path)
        raise conditions.BadPath(field="dest.path", path=path, problem="is the source")
    device_dest.check_size(dest, planned)


def _device_of(fd: int) -> int:
    """Which device a descriptor leads to; 0 for a file."""
    return os.fstat(fd).st_rdev


@contextlib.contextmanager
def undefined_on_failure(dest: Dest, line: context.JobContext) -> Iterator[None]:
    """Have a failure say that the device's content is undefined. A file just never appears."""
    line.undefined_device = dest.place.path if isinstance(dest, device_dest.DeviceDest) else ""
    try:
        yield
    except conditions.ConvertError as error:
        error.undefined_device = line.undefined_device
        raise


def rules_of(dest: Dest) -> tuple[landlock.Rule, ...]:
    """What it takes to write and to publish a destination."""
    if isinstance(dest, device_dest.DeviceDest):
        return (landlock.Rule(where=dest.fd, access=landlock.DEVICE),)
    return (
        landlock.Rule(where=dest.fd, access=landlock.WRITE),
        landlock.Rule(where=dest.target.directory, access=landlock.PUBLISH_IN),
        *((name_alias.rule(dest.alias),) if dest.alias else ()),
    )


def expected_warnings(dest: Dest) -> tuple[values.Warning, ...]:
    """What the result will have to be told of, as far as it is known before it is written."""
    return () if isinstance(dest, device_dest.DeviceDest) else dest.expected


def dest_refusal(dest: Dest) -> str | None:
    """What speaks against direct writes; a device is asked by reading it.

    Raises:
        conditions.WriteFailed, conditions.NoSpace, conditions.QuotaExceeded: the trial could not be
            undone.
    """
    if isinstance(dest, device_dest.DeviceDest):
        return direct_io.read_refusal(dest.fd)
    try:
        return direct_io.write_refusal(dest.fd)
    except OSError as error:
        space.raise_if_full(error, dest.target)
        problem = os.strerror(error.errno or 0)
        raise conditions.WriteFailed(path=dest.place.path, problem=problem) from error


def available_bytes(dest: Dest) -> int:
    """The room there is for the result."""
    return (
        dest.size_bytes
        if isinstance(dest, device_dest.DeviceDest)
        else space.free_bytes(dest.target)
    )
