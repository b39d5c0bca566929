"""The two ends of a conversion, open."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convertd_core import conditions, values
from convertd_daemon.job import stages
from convertd_daemon.job.files import (
    device_dest,
    direct_io,
    file_dest,
    opened_source,
    page_cache,
)
from convertd_daemon.job.qemu import execution, plan
from convertd_daemon.sandbox import landlock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convertd_daemon.job import context
    from convertd_daemon.job.files.destination import Destination
    from convertd_daemon.job.qemu.backing_chain import ChainLink
    from convertd_daemon.sandbox.setup import Setup


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """What is read, the source with its backing chain, and what is written."""

    chain: tuple[ChainLink, ...]
    dest: Destination

    @property
    def source(self) -> opened_source.Source:
        """The source itself."""
        return self.chain[0].source

    @property
    def sources(self) -> tuple[opened_source.Source, ...]:
        """The files of the chain, the source itself first."""
        return tuple(link.source for link in self.chain)

    @property
    def members(self) -> tuple[stages.ChainMember, ...]:
        """The chain, without its descriptors."""
        return tuple(link.member for link in self.chain)

    def inodes(self, pipes: tuple[int, ...] = ()) -> execution.Inodes:
        """What qemu-img needs to convert."""
        read = tuple(link.source.fd for link in self.chain)
        return dataclasses.replace(self.dest.inodes(), read=read, pipes=pipes)

    def nodes(self) -> tuple[plan.Node, ...]:
        """The chain, as the plan needs it."""
        return tuple(
            plan.Node(
                format=link.info.format,
                fd=link.source.fd,
                on_device=link.source.place.root.kind is values.RootKind.BLOCK,
            )
            for link in self.chain
        )

    def dest_node(self, image_format: str) -> plan.Node:
        """The destination, as the plan needs it."""
        dest = self.dest
        return plan.Node(
            format=image_format, fd=dest.fd, on_device=dest.on_device, alias=dest.alias
        )

    def try_out(self, image_format: str) -> plan.Facts:
        """Find out what can only be known by trying. Once, while the destination is empty."""
        refusals = (direct_io.read_refusal(link.source.fd) for link in self.chain)
        return plan.Facts(
            chain=self.nodes(),
            dest=self.dest_node(image_format),
            source_direct=next((refusal for refusal in refusals if refusal), None),
            dest_direct=self.dest.direct_refusal(),
            available_bytes=self.dest.available_bytes(),
            in_memory=all(page_cache.is_in_memory(link.source.fd) for link in self.chain),
        )

    def after_trial(
        self, grant: values.ConvertGrant, planned: stages.ConversionPlan
    ) -> stages.ConversionPlan:
        """The plan, after a trial of how the disk is written more quickly, if that may change it.

        Only where the same disk has to read the source: else the page cache could fill with what is
        read more quickly than it is written.

        Raises:
            conditions.ConvertError: as destination.Destination.write_rates.
        """
        if planned.source_cache.mode is not values.CacheMode.NONE:
            return planned
        disks = {os.fstat(source.fd).st_dev for source in self.sources}
        if disks != {os.fstat(self.dest.fd).st_dev}:
            return planned
        rates = self.dest.write_rates(grant, planned)
        return plan.with_rates(planned, rates) if rates else planned

    def rules(self) -> tuple[landlock.Rule, ...]:
        """What the job itself keeps of the file system."""
        read = tuple(
            landlock.Rule(where=link.source.fd, access=landlock.READ) for link in self.chain
        )
        return (*read, *self.dest.rules())


def open_dest(
    grant: values.ConvertGrant, setup: Setup
) -> contextlib.AbstractContextManager[Destination]:
    """Open what will be written: a device, or an inode that has no name yet.

    Raises:
        conditions.ConvertError: as device_dest.open_dest and file_dest.open_dest.
    """
    if grant.dest.root.kind is values.RootKind.BLOCK:
        return device_dest.open_dest(grant, setup.identity)
    return file_dest.open_dest(grant, setup)


@contextlib.contextmanager
def undefined_on_failure(dest: Destination, job: context.JobContext) -> Iterator[None]:
    """Have a failure say that a device's content is undefined. A file just never appears."""
    job.undefined_device = dest.undefined_on_failure
    try:
        yield
    except conditions.ConvertError as error:
        error.undefined_device = job.undefined_device
        raise
