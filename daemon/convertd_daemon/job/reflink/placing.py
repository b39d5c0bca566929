"""Put data into the result: whole blocks are shared, and what is no whole block is copied."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from convertd_core import values
from convertd_daemon.job import progress
from convertd_daemon.linux import ioctl

if TYPE_CHECKING:
    from convertd_daemon.job.context import JobContext
    from convertd_daemon.job.reflink.extents import Extent
    from convertd_daemon.job.reflink.snapshot import Snapshot

CLONE_BYTES: Final = 256 * values.MIB
"""What is shared by one call, which can't be interrupted. In blocks of 4 KiB, each in a place of
its own, it takes a second."""

COPY_BYTES: Final = values.MIB
"""What is copied at once."""


class Placer:
    """Puts what the files of a snapshot have into the result.

    `total_bytes` is what there is to place, for the progress.
    """

    def __init__(self, taken: Snapshot, total_bytes: int, job: JobContext) -> None:
        self.shared_bytes = 0
        self._done_bytes = 0
        self._members = tuple(source.fd for source in taken.ends.sources)
        self._dest, self._block = taken.dest.fd, taken.block_bytes
        self._total_bytes = max(total_bytes, 1)
        self._job = job
        self._reporter = progress.PercentReporter(job)

    def place_at_start(self, extent: Extent) -> None:
        """Put an extent where the disk has it: in a raw file. Raises what `place` does."""
        start = extent.start_bytes
        if extent.offset_bytes is not None:
            self.place(extent.member, extent.offset_bytes, start, extent.length_bytes)

    def place(self, member: int, source: int, dest: int, length: int) -> None:
        """Put a stretch of a member's file, from offset `source` on, to offset `dest`.

        Raises:
            Cancelled, conditions.DurationExceeded: see JobContext.check.
            OSError: it can't be shared, or not be read or written.
        """
        head, whole = whole_blocks(source, dest, length, self._block)
        self._copy(member, source, dest, head)
        self._share(member, source + head, dest + head, whole)
        done = head + whole
        self._copy(member, source + done, dest + done, length - done)

    def _share(self, member: int, source: int, dest: int, length: int) -> None:
        end = source + length
        while source < end:
            piece = min(CLONE_BYTES, end - source)
            ioctl.ficlonerange(
                self._dest,
                self._members[member],
                dest_offset=dest,
                source_offset=source,
                length=piece,
            )
            source, dest = source + piece, dest + piece
            self.shared_bytes += piece
            self._moved(piece)

    def _copy(self, member: int, source: int, dest: int, length: int) -> None:
        while length:
            data = os.pread(self._members[member], min(COPY_BYTES, length), source)
            if not data:
                raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
            written = os.pwrite(self._dest, data, dest)
            source, dest, length = source + written, dest + written, length - written
            self._moved(written)

    def _moved(self, count: int) -> None:
        self._job.check()
        self._done_bytes += count
        self._reporter.report(min(self._done_bytes / self._total_bytes, 1.0) * progress.ALL)


def whole_blocks(source: int, dest: int, length: int, block: int) -> tuple[int, int]:
    """How many bytes of a stretch come before its first whole block, and how many are in such.

    None are, if the two offsets don't lie in the same place of a block.
    """
    head = -source % block
    if (source - dest) % block or head + block > length:
        return length, 0
    return head, (length - head) // block * block
