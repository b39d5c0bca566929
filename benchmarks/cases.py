"""The conversions that are measured: a table for each kind of disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from benchmarks.images import Image, Images
from benchmarks.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One conversion, on whatever disk. `compression` is empty, zlib or zstd.

    With `undeclared`, callers don't state the source's format. `small` ones take milliseconds. If
    `warm`, the source is in the page cache beforehand, which decides how convertd reads it.
    `contestants` are those that take part; if there are none, all do that can. `more_rounds` tells
    how many times as many rounds there are, for a small difference.
    """

    name: str
    image: str
    dest_format: str
    compression: str = ""
    undeclared: bool = False
    small: bool = False
    warm: bool = False
    contestants: frozenset[str] = frozenset()
    more_rounds: int = 1

    def with_warm(self) -> tuple[Row, Row]:
        """The row, and the same with a source that is in the page cache."""
        return self, replace(self, name=f"{self.name}, warm", warm=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A row on a disk."""

    disk: str
    row: Row
    source: Image
    rounds: int

    @property
    def name(self) -> str:
        """What results know it by."""
        return name(self.row.name, self.disk)


def name(row: str, disk: str) -> str:
    """What results know a row on a disk by."""
    return f"{row} ({disk})"


OWN: Final = "own disk"
MEMORY: Final = "memory disk"
CACHED: Final = "cached disk"
SLOW: Final = "slow disk"
XFS: Final = "XFS"
BTRFS: Final = "btrfs"
"""The disks. See disks.py."""

DEFAULT: Final = (OWN, SLOW, XFS, BTRFS)
"""Those that are measured unless others are named."""

NEEDED: Final = frozenset({OWN, XFS, BTRFS})
"""Those without which the page would be a part, beside one more of PLAIN."""

PLAIN: Final = (OWN, MEMORY, CACHED, SLOW)
"""Where everything has to be copied."""

SHARING: Final = (XFS, BTRFS)
"""File systems on which files can share blocks."""

TINY: Final = "tiny raw → qcow2"
TINY_UNDECLARED: Final = "tiny raw → qcow2, format not stated"
FILES_TO_RAW: Final = "files qcow2 → raw"
FILES_TO_QCOW2: Final = "files raw → qcow2"
ZLIB: Final = "packed raw → qcow2, zlib"
ZSTD: Final = "packed raw → qcow2, zstd"
CHAIN_TO_QCOW2: Final = "chain of 3 → qcow2"
RANDOM: Final = "random raw → qcow2"
RANDOM_TO_RAW: Final = "random raw → raw"
CLONE: Final = "empty raw → raw"
COMPRESSED: Final = "zlib qcow2 → raw"
SMALL_EXTENTS: Final = "small extents"
LARGE_EXTENTS: Final = "large extents"
"""Rows that goals are about."""

QUICK: Final = frozenset({"nova argv", "cdi argv", "cp", "convertd"})
"""Who takes part where blocks can be shared: elsewhere there is something to tell of the others."""

SMALL: Final = (
    *Row(name=TINY, image="tiny.raw", dest_format="qcow2", small=True).with_warm(),
    Row(name=TINY_UNDECLARED, image="tiny.raw", dest_format="qcow2", undeclared=True, small=True),
    Row(name="tiny qcow2 → raw", image="tiny.qcow2", dest_format="raw", small=True),
    Row(name="empty raw → qcow2", image="empty.raw", dest_format="qcow2", small=True),
    Row(name="empty qcow2 → raw", image="empty.qcow2", dest_format="raw", small=True),
)

COPYING: Final = (
    *Row(name=FILES_TO_QCOW2, image="files.raw", dest_format="qcow2").with_warm(),
    *Row(name=FILES_TO_RAW, image="files.qcow2", dest_format="raw").with_warm(),
    Row(name="files qcow2 → qcow2", image="files.qcow2", dest_format="qcow2"),
    Row(name="files raw → raw", image="files.raw", dest_format="raw"),
    Row(name="fragmented qcow2 → raw", image="fragmented.qcow2", dest_format="raw"),
    Row(name=COMPRESSED, image="zlib.qcow2", dest_format="raw"),
    Row(name=RANDOM, image="random.raw", dest_format="qcow2"),
    Row(name=RANDOM_TO_RAW, image="random.raw", dest_format="raw"),
)

COMPRESSING: Final = (
    Row(name=ZLIB, image="packed.raw", dest_format="qcow2", compression="zlib"),
    Row(name=ZSTD, image="packed.raw", dest_format="qcow2", compression="zstd"),
    Row(
        name="packed qcow2 → qcow2, zstd",
        image="packed.qcow2",
        dest_format="qcow2",
        compression="zstd",
    ),
)

SHARED: Final = tuple(
    row
    for cold in (
        Row(name=FILES_TO_QCOW2, image="files.raw", dest_format="qcow2"),
        Row(name=FILES_TO_RAW, image="files.qcow2", dest_format="raw"),
        Row(name="files qcow2 → qcow2", image="files.qcow2", dest_format="qcow2"),
        Row(name=CHAIN_TO_QCOW2, image="chain.qcow2", dest_format="qcow2"),
        Row(name="chain of 3 → raw", image="chain.qcow2", dest_format="raw"),
    )
    for row in replace(cold, contestants=QUICK).with_warm()
)
"""What is to be converted without copying the data."""

EXTENTS: Final = tuple(
    Row(
        name=f"{extents} {source} → {dest}, warm",
        image=f"{extents}.{source}",
        dest_format=dest,
        warm=True,
        contestants=QUICK,
    )
    for source, dest in (("raw", "qcow2"), ("qcow2", "raw"))
    for extents in (SMALL_EXTENTS, LARGE_EXTENTS)
)
"""As many extents of data, ten times as large."""

CLONED: Final = (
    Row(name="files raw → raw", image="files.raw", dest_format="raw", contestants=QUICK),
    Row(name=CLONE, image="empty.raw", dest_format="raw", small=True, contestants=QUICK),
)

NOT_SHARED: Final = (
    Row(
        name=COMPRESSED,
        image="zlib.qcow2",
        dest_format="raw",
        contestants=frozenset({"nova argv", "convertd", "convertd, reflink never"}),
        more_rounds=5,
    ),
)
"""What can't be shared, which costs some time to find out."""

ROWS: Final[Mapping[str, Sequence[Row]]] = {
    OWN: (*SMALL, *COPYING, *COMPRESSING),
    MEMORY: COPYING,
    CACHED: COPYING,
    SLOW: COPYING,
    XFS: (*SHARED, *EXTENTS, *CLONED, *NOT_SHARED),
    BTRFS: (*SHARED, *EXTENTS, *CLONED),
}


def make(disk: str, rows: Sequence[Row], images: Images, settings: Settings) -> tuple[Case, ...]:
    """The rows as cases on a disk; their images are made."""
    return tuple(
        Case(
            disk=disk,
            row=row,
            source=images.make(row.image),
            rounds=(settings.small_rounds if row.small else settings.large_rounds)
            * row.more_rounds,
        )
        for row in rows
    )
