"""What passes between the stages of a job: what is known of the images, and its plan.

Nothing here does anything. Sizes are in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from convertd_core import results, values


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
    def told(self) -> results.ImageMember:
        """What its caller is told of it."""
        return results.ImageMember(
            path=self.path,
            format=self.info.format,
            virtual_size_bytes=self.info.virtual_size_bytes,
            actual_size_bytes=self.info.actual_size_bytes,
            encrypted=self.info.encrypted,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionPlan:
    """Everything that is decided before qemu-img runs. The chain begins with the source itself.

    `argv` speaks of descriptors only; `command` is the same for people, with the caller's paths.
    `needed_bytes` is what the destination is expected to take, 0 where that can't be known.
    """

    chain: tuple[ChainMember, ...]
    dest_format: str
    compression: values.Compression
    source_cache: results.CacheChoice
    dest_cache: results.CacheChoice
    argv: tuple[str, ...]
    command: tuple[str, ...]
    needed_bytes: int
    available_bytes: int
    method: results.Method = results.Method.QEMU_IMG
    method_reason: str = ""
    warnings: tuple[results.Warning, ...] = ()

    @property
    def source(self) -> ProbedImage:
        """The source itself, whatever lies under it."""
        return self.chain[0].info

    @property
    def told(self) -> results.Plan:
        """What its caller is told of it."""
        return results.Plan(
            source_format=self.source.format,
            dest_format=self.dest_format,
            virtual_size_bytes=self.source.virtual_size_bytes,
            dest_cache=self.dest_cache,
            source_cache=self.source_cache,
            command=self.command,
            chain=tuple(member.told for member in self.chain),
            compression=self.compression,
            needed_bytes=self.needed_bytes,
            available_bytes=self.available_bytes,
            method=self.method,
            method_reason=self.method_reason,
        )
