"""What passes between the stages of a job: what is known of the images, and its plan.

Nothing here does anything. Sizes are in bytes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from convertd_core import results


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What Inspect alone tells of an image, as qemu-img, contained, said it.

    `compressed` is what headers say: those of a qcow2 say nothing of it.
    """

    snapshots: tuple[results.Snapshot, ...] = ()
    bitmaps: tuple[results.Bitmap, ...] = ()
    compressed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedImage:
    """What qemu-img, contained, said of one image.

    Snapshots and bitmaps are there by name only. `warnings` are what its header gives cause for.
    """

    format: str
    virtual_size_bytes: int
    actual_size_bytes: int
    cluster_size_bytes: int = 0
    encrypted: bool = False
    dirty: bool = False
    corrupt: bool = False
    backing_name: str = ""
    backing_format: str = ""
    snapshots: tuple[str, ...] = ()
    bitmaps: tuple[str, ...] = ()
    details: tuple[tuple[str, str], ...] = ()
    warnings: tuple[results.Warning, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainMember:
    """One image of a chain, under the name by which the caller or its overlay knows it."""

    path: str
    info: ProbedImage

    @property
    def reported(self) -> results.ImageMember:
        """What its caller gets of it."""
        return results.ImageMember(
            path=self.path,
            format=self.info.format,
            virtual_size_bytes=self.info.virtual_size_bytes,
            actual_size_bytes=self.info.actual_size_bytes,
            encrypted=self.info.encrypted,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteRates:
    """How quickly a disk took what was written to it past the page cache, and through it."""

    direct_bytes_per_s: float
    buffered_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionPlan(results.Plan):
    """A plan, and what only its job needs of it.

    `argv` speaks of descriptors. `write_behind` says that the result goes through the page cache
    and is not to stay there.
    """

    argv: tuple[str, ...]
    warnings: tuple[results.Warning, ...] = ()
    write_behind: bool = False

    @property
    def reported(self) -> results.Plan:
        """What its caller gets of it."""
        names = (item.name for item in dataclasses.fields(results.Plan))
        return results.Plan(**{name: getattr(self, name) for name in names})
