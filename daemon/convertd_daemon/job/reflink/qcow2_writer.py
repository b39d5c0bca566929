"""Write a qcow2 around data that somebody else places. Nothing is parsed here, only written.

The clusters of the file are used in the order in which the disk is described, each exactly once, as
a conversion of qemu-img's uses them; so the file is as long as qemu-img's.

    header | refcount table | refcount block | L1 table | L2 table | data … | L2 table | data …

Memory holds a page of the L1 table, one of the present L2 table, and 8 bytes for each refcount
block (one in 2 GiB of file, at clusters of 64 KiB).

Source: docs/interop/qcow2.txt of qemu.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from convertd_core import values
from convertd_daemon.job.reflink import qcow2_clusters
from convertd_daemon.job.reflink.extents import Extent
from convertd_daemon.job.reflink.qcow2_clusters import ENTRY_BYTES

MAX_L1_BYTES: Final = 32 * values.MIB
"""What qemu reads of an L1 table. Source: block/qcow2.h."""

COPIED: Final = 1 << 63
"""The flag of an entry whose cluster has a reference count of one, as all have here."""

PAGE_ENTRIES: Final = 8192

LAZY_REFCOUNTS: Final = 1
"""A compatible feature."""

END_OF_EXTENSIONS: Final = bytes(8)

_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_HEADER_V3: Final = struct.Struct(">QQQII8x")

Place = Callable[[int, int, int, int], None]
"""Put data into the file: member, offset in the member's file, offset in the result, length.

It is called in the order of the disk. What it is not called for reads as zero: the file has a hole
there. Within a cluster, data has the place that it has in the disk; so both offsets are aligned to
blocks of a file system if the extent is, and if clusters are whole blocks.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Creation:
    """The options with which an image is made, as far as they can be written here."""

    cluster_bits: int = 16
    refcount_order: int = 4
    version: int = 3
    lazy_refcounts: bool = False

    @property
    def cluster_bytes(self) -> int:
        """The size of a cluster."""
        return 1 << self.cluster_bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """How long the file is, and how much of it was written: all but what was placed."""

    length_bytes: int
    written_bytes: int


def problem(dest: values.Destination) -> str:
    """Why only qemu-img can write this destination, as a clause; empty if it can be written here.

    Whether the clusters are whole blocks of the file system is for the caller to see.
    """
    options = {option.name: option.value for option in dest.options}
    unable = {
        "the result is no qcow2": dest.format != "qcow2",
        "the result is compressed": dest.compression is not values.Compression.NONE,
        "the result is encrypted": dest.encryption is not None,
        "the result is preallocated": dest.preallocation is not values.Preallocation.OFF,
        "the result has extended L2 entries": options.get("extended_l2") == "on",
        "the result has an option that only qemu-img knows": not options.keys() <= _OPTIONS,
    }
    return next((clause for clause, applies in unable.items() if applies), "")


_OPTIONS: Final = frozenset(
    {"cluster_size", "compat", "extended_l2", "lazy_refcounts", "refcount_bits"}
)


def creation(dest: values.Destination) -> Creation:
    """The options of a destination that has no `problem`; what is not given is qemu's default."""
    options = {option.name: option.value for option in dest.options}
    return Creation(
        cluster_bits=int(options.get("cluster_size", "65536")).bit_length() - 1,
        refcount_order=int(options.get("refcount_bits", "16")).bit_length() - 1,
        version=2 if options.get("compat") == "0.10" else 3,
        lazy_refcounts=options.get("lazy_refcounts") == "on",
    )


def write(
    fd: int, size_bytes: int, asked: Creation, extents: Iterable[Extent], place: Place
) -> Written:
    """Write a disk of `size_bytes` as a qcow2 into an empty file, and have its data placed.

    The extents are taken one by one, in the order of the disk; they don't overlap, and none goes
    beyond the disk's end. What they leave out reads as zero. What reads as zero gets no cluster,
    unless it shares one with data. Nothing is flushed to disk.

    Whatever `extents` or `place` raises ends it; the file is no image then.

    Raises:
        OSError: the file can't be written.
        ValueError: the extents are not as said above, or the disk is too large for the clusters.
    """
    writer = _Writer(fd, size_bytes, asked, place)
    for extent in extents:
        writer.add(extent)
    return writer.finish()


class _Writer:
    """A file that is being written."""

    def __init__(self, fd: int, size_bytes: int, asked: Creation, place: Place) -> None:
        self._file = qcow2_clusters.File(fd)
        self._size, self._asked, self._place = size_bytes, asked, place
        self._cluster = asked.cluster_bytes
        self._l2_entries = self._cluster // ENTRY_BYTES
        self._l2_span = self._l2_entries * self._cluster
        l1_entries = -(-size_bytes // self._l2_span)
        if l1_entries * ENTRY_BYTES > MAX_L1_BYTES:
            raise ValueError(f"{size_bytes} bytes are too many for clusters of {self._cluster}")
        self._clusters = qcow2_clusters.Clusters(asked.cluster_bits, asked.refcount_order)
        self._l1 = _Table(self._file, self._clusters.take(l1_entries * ENTRY_BYTES), l1_entries)
        self._l2 = _Table(self._file, 0, 0)
        self._l2_index = -1
        self._described = 0
        # The cluster of the disk that has data last, and where it is in the file.
        self._last = -1
        self._last_offset = 0

    def add(self, extent: Extent) -> None:
        """Describe the next stretch of the disk."""
        start, end = extent.start_bytes, extent.end_bytes
        if not self._described <= start < end <= self._size:
            raise ValueError(f"bytes {start} to {end} after {self._described} of {self._size}")
        self._described = end
        if extent.offset_bytes is None:
            return
        moved = extent.offset_bytes - start
        while start < end:
            index = start // self._l2_span
            if index != self._l2_index:
                self._begin_l2(index)
            stop = min(end, (index + 1) * self._l2_span)
            for first, dest, length in self._stretches(start, stop):
                self._place(extent.member, first + moved, dest, length)
            start = stop

    def finish(self) -> Written:
        """Write what is known at the end only."""
        self._l2.flush()
        self._l1.flush()
        refcounts = self._clusters.write_refcounts(self._file)
        self._file.write(self._header(refcounts), 0)
        os.ftruncate(self._file.fd, self._clusters.length_bytes)
        return Written(
            length_bytes=self._clusters.length_bytes, written_bytes=self._file.written_bytes
        )

    def _begin_l2(self, index: int) -> None:
        self._l2.flush()
        offset = self._clusters.take(self._cluster)
        self._l1.set(index, range(offset, offset + 1))
        self._l2 = _Table(self._file, offset, self._l2_entries)
        self._l2_index = index

    def _stretches(self, start: int, end: int) -> Iterable[tuple[int, int, int]]:
        """Give clusters to a stretch below one L2 table: start, offset in the file, length."""
        if start // self._cluster == self._last:
            # The extent before ended in this cluster.
            stop = min(end, (self._last + 1) * self._cluster)
            yield start, self._last_offset + start % self._cluster, stop - start
            start = stop
        if start == end:
            return
        first, self._last = start // self._cluster, (end - 1) // self._cluster
        count = self._last - first + 1
        offset = self._clusters.take(count * self._cluster)
        self._last_offset = offset + (count - 1) * self._cluster
        self._l2.set(
            first % self._l2_entries,
            range(offset, offset + count * self._cluster, self._cluster),
        )
        yield start, offset + start % self._cluster, end - start

    def _header(self, refcounts: qcow2_clusters.Refcounts) -> bytes:
        """The header as qemu-img makes it, without a table of the features' names."""
        header = _HEADER.pack(
            b"QFI\xfb",
            self._asked.version,
            0,  # no backing file
            0,
            self._asked.cluster_bits,
            self._size,
            0,  # not encrypted
            self._l1.entries,
            self._l1.offset if self._l1.entries else 0,
            refcounts.table_offset,
            refcounts.table_clusters,
            0,  # no snapshots
            0,
        )
        if self._asked.version > 2:  # noqa: PLR2004 - qcow2's own number
            header += _HEADER_V3.pack(
                0,  # no incompatible feature
                LAZY_REFCOUNTS if self._asked.lazy_refcounts else 0,
                0,  # nothing that goes when something else writes
                self._asked.refcount_order,
                _HEADER.size + _HEADER_V3.size,
            )
        return header + END_OF_EXTENSIONS


class _Table:
    """Entries in a file, set in order. A page of them is kept, and written when it is left."""

    def __init__(self, file: qcow2_clusters.File, offset: int, entries: int) -> None:
        self.offset, self.entries = offset, entries
        self._file = file
        self._first = 0
        self._page = array("Q")

    def set(self, index: int, offsets: range) -> None:
        """Set entries from `index` on to the offsets of clusters."""
        while offsets:
            if not self._first <= index < self._first + len(self._page):
                self._turn_to(index)
            at = index - self._first
            part = offsets[: len(self._page) - at]
            flagged = range(part.start | COPIED, part.stop | COPIED, part.step)
            self._page[at : at + len(part)] = array("Q", flagged)
            offsets = offsets[len(part) :]
            index += len(part)

    def flush(self) -> None:
        """Write the page that is kept."""
        if self._page:
            offset = self.offset + self._first * ENTRY_BYTES
            self._file.write(qcow2_clusters.big_endian(self._page), offset)
        self._page = array("Q")

    def _turn_to(self, index: int) -> None:
        self.flush()
        self._first = index - index % PAGE_ENTRIES
        length = min(PAGE_ENTRIES, self.entries - self._first)
        self._page = array("Q", bytes(length * ENTRY_BYTES))
