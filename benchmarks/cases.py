"""The conversions that are measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

from benchmarks.images import Image, Images
from benchmarks.settings import Settings

COLD: Final = "cold"
WARM: Final = "warm"
"""Whether the source is in the page cache beforehand, which decides how convertd reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One conversion. `compression` is empty, zlib or zstd.

    With `undeclared`, callers don't state the source's format.
    """

    name: str
    source: Image
    dest_format: str
    compression: str = ""
    undeclared: bool = False
    rounds: int
    cache: str = COLD

    def warm(self) -> Case:
        """The same with a source that is in the page cache."""
        return dataclasses.replace(self, name=f"{self.name}, warm", cache=WARM)


TINY: Final = "tiny raw → qcow2"
TINY_UNDECLARED: Final = "tiny raw → qcow2, format not stated"
FILES_TO_RAW: Final = "files qcow2 → raw"
FILES_TO_QCOW2: Final = "files raw → qcow2"
ZLIB: Final = "packed raw → qcow2, zlib"
ZSTD: Final = "packed raw → qcow2, zstd"
NOISE: Final = "noise raw → qcow2"
NOISE_TO_RAW: Final = "noise raw → raw"
CLONE: Final = "empty raw → raw, on XFS"
"""Cases that goals are about."""


def make(images: Images, settings: Settings) -> tuple[Case, ...]:
    """All cases."""
    large, small = settings.large_rounds, settings.small_rounds
    tiny = Case(name=TINY, source=images.tiny, dest_format="qcow2", rounds=small)
    to_qcow2 = Case(name=FILES_TO_QCOW2, source=images.files, dest_format="qcow2", rounds=large)
    to_raw = Case(name=FILES_TO_RAW, source=images.files_qcow2, dest_format="raw", rounds=large)
    return (
        tiny,
        tiny.warm(),
        Case(
            name=TINY_UNDECLARED,
            source=images.tiny,
            dest_format="qcow2",
            undeclared=True,
            rounds=small,
        ),
        Case(name="tiny qcow2 → raw", source=images.tiny_qcow2, dest_format="raw", rounds=small),
        to_qcow2,
        to_qcow2.warm(),
        to_raw,
        to_raw.warm(),
        Case(
            name="files qcow2 → qcow2",
            source=images.files_qcow2,
            dest_format="qcow2",
            rounds=large,
        ),
        Case(name="files raw → raw", source=images.files, dest_format="raw", rounds=large),
        Case(
            name="fragmented qcow2 → raw",
            source=images.fragmented,
            dest_format="raw",
            rounds=large,
        ),
        Case(name="zlib qcow2 → raw", source=images.zlib, dest_format="raw", rounds=large),
        *(
            Case(
                name=f"packed {source.format} → qcow2, {compression}",
                source=source,
                dest_format="qcow2",
                compression=compression,
                rounds=large,
            )
            for source in (images.packed, images.packed_qcow2)
            for compression in ("zlib", "zstd")
        ),
        Case(name=NOISE, source=images.noise, dest_format="qcow2", rounds=large),
        Case(name=NOISE_TO_RAW, source=images.noise, dest_format="raw", rounds=large),
        Case(name="empty raw → qcow2", source=images.empty, dest_format="qcow2", rounds=small),
        Case(name="empty qcow2 → raw", source=images.empty_qcow2, dest_format="raw", rounds=small),
        Case(name=CLONE, source=images.xfs_empty, dest_format="raw", rounds=small),
    )
