"""The clusters of a qcow2 that is written from front to back, and their reference counts.

Each cluster is used once, so each reference count is one. A refcount block is put where the first
cluster would be that the blocks before it can't count.

The refcount table is the second cluster, as qemu-img has it. It holds the blocks of 16 TiB of file
with clusters of 64 KiB, of 4 GiB with 4 KiB. If there are more, it comes last, when it is known how
many; and its cluster holds the block that was one too many. (qemu-img gives such a table a new
place, half again as large: from there on its file may be longer by a few clusters.)
"""

from __future__ import annotations

import os
import sys
from array import array
from dataclasses import dataclass
from typing import Final

ENTRY_BYTES: Final = 8
"""What an entry of any table of offsets has."""

BYTE_BITS: Final = 8


class File:
    """The file that is written."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.written_bytes = 0

    def write(self, data: bytes, offset: int) -> None:
        """Write all of it.

        Raises:
            OSError: ENOSPC, EDQUOT, EIO, …
        """
        self.written_bytes += len(data)
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self.fd, rest, offset)
            rest, offset = rest[written:], offset + written


@dataclass(frozen=True, slots=True, kw_only=True)
class Refcounts:
    """Where the refcount table is, and how many clusters it has."""

    table_offset: int
    table_clusters: int


class Clusters:
    """Hands out the clusters of a file in order; those of header and refcount table are taken."""

    def __init__(self, cluster_bits: int, refcount_order: int) -> None:
        self._cluster = 1 << cluster_bits
        self._refcount_bits = 1 << refcount_order
        self._per_block = self._cluster * BYTE_BITS // self._refcount_bits
        self._per_table = self._cluster // ENTRY_BYTES
        self._blocks = array("Q")
        self._used = 2
        self._unused_bytes = 0

    @property
    def length_bytes(self) -> int:
        """How long the file is. What is not used of the last cluster need not be there."""
        return self._used * self._cluster - self._unused_bytes

    def take(self, length_bytes: int) -> int:
        """Use as many more clusters as that takes, one after the other; gives their offset."""
        count = -(-length_bytes // self._cluster)
        self._add_blocks(count)
        offset = self._used * self._cluster
        self._used += count
        self._unused_bytes = count * self._cluster - length_bytes
        return offset

    def write_refcounts(self, file: File) -> Refcounts:
        """Write that each cluster is used once. No more can be taken afterwards."""
        table = Refcounts(table_offset=self._cluster, table_clusters=1)
        if len(self._blocks) > self._per_table:
            table = self._take_table()
        full = self._ones(self._per_block)
        for number, offset in enumerate(self._blocks):
            count = self._used - number * self._per_block
            file.write(full if count >= self._per_block else self._ones(count), offset)
        file.write(big_endian(self._blocks), table.table_offset)
        return table

    def _add_blocks(self, count: int) -> None:
        """Have blocks that count so many more clusters, and themselves."""
        while len(self._blocks) * self._per_block < self._used + count:
            if len(self._blocks) == self._per_table:
                self._blocks.append(self._cluster)  # the table's, which has no room for it
            else:
                self._blocks.append(self._used * self._cluster)
                self._used += 1

    def _take_table(self) -> Refcounts:
        clusters = 1
        self._add_blocks(clusters)
        while clusters * self._per_table < len(self._blocks):
            clusters += 1
            self._add_blocks(clusters)
        return Refcounts(table_offset=self.take(clusters * self._cluster), table_clusters=clusters)

    def _ones(self, count: int) -> bytes:
        """A block that counts its first `count` clusters once each, and no other."""
        if self._refcount_bits >= BYTE_BITS:
            ones = (1).to_bytes(self._refcount_bits // BYTE_BITS, "big") * count
        else:
            # Several to a byte, the first in its lowest bits.
            bits = sum(1 << shift for shift in range(0, BYTE_BITS, self._refcount_bits))
            whole, rest = divmod(count * self._refcount_bits, BYTE_BITS)
            ones = bytes([bits]) * whole + bytes([bits & (1 << rest) - 1])
        return ones.ljust(self._cluster, b"\0")[: self._cluster]


def big_endian(entries: array[int]) -> bytes:
    """The entries of a table as they are in the file. Changes nothing in the array given."""
    if sys.byteorder == "big":
        return entries.tobytes()
    swapped = array("Q", entries)
    swapped.byteswap()
    return swapped.tobytes()
