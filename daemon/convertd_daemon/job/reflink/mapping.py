"""Where the data of a disk lies, in which member's file: as qemu-img maps it, or the kernel.

Fails closed: a map that could not be one, or that names what the files don't have, is not used. A
qemu-img that its image has taken over can so name no more than places in files that the caller may
read.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Final

from convertd_core import conditions, values
from convertd_daemon.job.files import data_ranges
from convertd_daemon.job.qemu import conversion, execution, image_map
from convertd_daemon.job.qemu import plan as plans
from convertd_daemon.job.reflink import eligibility, placing
from convertd_daemon.job.reflink.extent_list import ExtentList
from convertd_daemon.job.reflink.extents import Extent
from convertd_daemon.sandbox import limits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convertd_daemon.job.files.opened_source import Source
    from convertd_daemon.job.reflink.snapshot import Snapshot

log = logging.getLogger(__name__)

MOST_COPIED_BYTES: Final = values.MIB
"""What may be copied byte by byte of what is no whole block: ends of images, as a rule one or two.
An image that has more of it was made with clusters smaller than a block."""

NOT_UNDERSTOOD: Final = "qemu-img maps the image in a way that convertd does not understand"


def of_file(source: Source) -> Iterator[Extent]:
    """The data of a raw image: all of its file but the holes, which only the kernel knows.

    Raises:
        OSError: the file system can't tell.
    """
    for start, end in data_ranges.data_ranges(source.fd, source.size_bytes):
        yield Extent(start_bytes=start, length_bytes=end - start, member=0, offset_bytes=start)


def of_chain(
    grant: values.ConvertGrant, taken: Snapshot, runner: execution.Runner
) -> tuple[ExtentList, int]:
    """What qemu-img says of the whole chain: its data, and how many bytes that is.

    Raises:
        conditions.ReflinkNotPossible: there is data that is no place in a file, or that is not
            aligned to blocks, or more than the files have; or there is no map.
        conditions.Stalled, conditions.DurationExceeded: as in a conversion.
        OSError: the list can't be written.
    """
    answer = _Map(grant, taken, runner)
    inodes = execution.Inodes(read=tuple(source.fd for source in taken.ends.sources))
    bounds = limits.Limits(address_space_bytes=grant.limits.memory_bytes)
    outcome = runner.run(plans.map_argv(*taken.ends.nodes()), inodes, bounds, answer)
    if outcome.status != 0:
        log.info("map failed status=%d stderr=%r", outcome.status, outcome.excerpt)
        raise answer.refused("qemu-img can't map the image")
    return answer.finish()


class _Map(conversion.Observer):
    """The map of a chain, judged line by line as it comes."""

    def __init__(
        self, grant: values.ConvertGrant, taken: Snapshot, runner: execution.Runner
    ) -> None:
        super().__init__(runner.context, taken.dest.fd, grant.limits.stall_seconds)
        self._chain, self._block = taken.ends.chain, taken.block_bytes
        self._size = self._chain[0].info.virtual_size_bytes
        self._extents = ExtentList(taken.scratch)
        self._reader = image_map.Reader()
        self._end = 0
        self._data_bytes = 0
        self._most_bytes = sum(source.size_bytes for source in taken.ends.sources)
        self._copied_bytes = 0

    def read(self, data: bytes) -> None:
        """Take a piece of the list."""
        with self._understood():
            for entry in self._reader.take(data):
                self._take(entry)

    def finish(self) -> tuple[ExtentList, int]:
        """Take the end of it; gives the data, and how many bytes that is."""
        with self._understood():
            for entry in self._reader.end():
                self._take(entry)
            if self._end != self._size:
                raise image_map.NotUnderstoodError
        self._extents.end()
        return self._extents, self._data_bytes

    def refused(self, problem: str, member: int = 0) -> conditions.ReflinkNotPossible:
        """The condition that blocks can't be shared, for a problem of one member."""
        return eligibility.refusal(self._chain[member].source.place, problem)

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        try:
            yield
        except image_map.NotUnderstoodError as error:
            raise self.refused(NOT_UNDERSTOOD) from error

    def _take(self, entry: image_map.Entry) -> None:
        """Take one stretch of the disk: they come without gaps, and end where the disk does."""
        start, length = entry.start, entry.length
        if start != self._end or not 0 < length <= self._size - start:
            raise image_map.NotUnderstoodError
        self._end = start + length
        if entry.zero:
            return
        if entry.depth >= len(self._chain):
            raise image_map.NotUnderstoodError
        if not entry.data:
            raise self.refused(
                "qemu-img can't tell the content of a part of the image", entry.depth
            )
        if entry.offset == image_map.NO_OFFSET:
            raise self.refused("the image has compressed data", entry.depth)
        self._add(entry)

    def _add(self, entry: image_map.Entry) -> None:
        member = entry.depth
        length = self._within_file(entry)
        if length <= 0:
            return
        _, whole = placing.whole_blocks(entry.offset, entry.start, length, self._block)
        self._copied_bytes += length - whole
        if self._copied_bytes > MOST_COPIED_BYTES:
            problem = f"the image's data is not aligned to blocks of {self._block} bytes"
            raise self.refused(problem, member)
        self._data_bytes += length
        if self._data_bytes > self._most_bytes:
            # Reference counts allow it: with 80 KiB of tables, a disk can be 16 GiB of one cluster.
            # The list of its stretches would take 128 MiB, which may be on nobody's quota.
            raise self.refused("the image uses parts of its file more than once", member)
        self._extents.add(entry.start, length, member, entry.offset)

    def _within_file(self, entry: image_map.Entry) -> int:
        """How much of a stretch its file has; less than all only in the last sector of a raw one.

        The rest of that reads as zero.
        """
        link = self._chain[entry.depth]
        size = link.source.size_bytes
        end = entry.offset + entry.length
        if end <= size:
            return entry.length
        if link.info.format == "raw" and end <= link.info.virtual_size_bytes:
            return size - entry.offset
        raise self.refused("the image's data goes on beyond the end of its file", entry.depth)
