"""What will be run, from what was granted and what was found. Pure: no call to the system.

The arguments speak of descriptors only. The source is always one complete graph of block drivers,
down to an explicit `backing: null`: a header rewritten after the probe can't add a parent, because
qemu no longer asks the header.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from convertd_daemon import errors, model

SECTOR_BYTES: Final = 512

COROUTINES: Final = "16"
"""`-m`: with `-c` and `-W`, 22.3 s instead of 41.8 s (4 GiB, 700 MiB of data, 2 cores)."""

DIRECT_MODES: Final = frozenset({model.CacheMode.NONE, model.CacheMode.DIRECTSYNC})


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the job found out about the two ends, as far as the plan depends on it.

    `*_direct` is None where reading or writing 4096 aligned bytes with O_DIRECT worked, else what
    the kernel said.
    """

    source_fd: int
    dest_fd: int
    source_direct: str | None
    dest_direct: str | None
    free_bytes: int


def make(grant: model.Grant, info: model.ImageInfo, facts: Facts) -> model.Plan:
    """Decide how the conversion is run.

    Raises:
        errors.ImageTooLarge: the virtual size is over the policy's limit.
        errors.Unsupported: a cache mode was asked for that the destination can't do.
    """
    limit = grant.limits.virtual_size_bytes
    if info.virtual_size_bytes > limit:
        raise errors.ImageTooLarge(
            path=grant.source.path, size_bytes=info.virtual_size_bytes, limit_bytes=limit
        )
    dest = grant.request.dest
    source_cache = _source_cache(facts)
    dest_cache = _dest_cache(grant, facts)
    options = _options(grant, source_cache, dest_cache)
    argv = (*options, graph(info.format, facts.source_fd), path_of(facts.dest_fd))
    return model.Plan(
        source_path=grant.source.path,
        source=info,
        dest_format=dest.format,
        compression=dest.compression,
        source_cache=source_cache,
        dest_cache=dest_cache,
        argv=argv,
        command=(*options, "-f", info.format, grant.source.path, grant.dest.path),
        needed_bytes=_needed_bytes(grant, info),
        available_bytes=facts.free_bytes,
        warnings=_warnings(info),
    )


def info_argv(fd: int, image_format: str) -> tuple[str, ...]:
    """`qemu-img info` of one descriptor. An empty format lets qemu probe, inside the sandbox."""
    stated = ("-f", image_format) if image_format else ()
    return ("qemu-img", "info", "--output=json", *stated, path_of(fd))


def compare_argv(plan: model.Plan, source_fd: int, dest_fd: int) -> tuple[str, ...]:
    """`qemu-img compare` of what was read with what was written."""
    return (
        "qemu-img",
        "compare",
        "-T",
        plan.source_cache.mode.value,
        graph(plan.source.format, source_fd),
        graph(plan.dest_format, dest_fd),
    )


def graph(image_format: str, fd: int) -> str:
    """An image as qemu's block graph: this driver, on this descriptor, and nothing behind it."""
    file = {"driver": "file", "filename": path_of(fd)}
    nodes: dict[str, object] = {"driver": image_format, "file": file}
    if image_format != "raw":
        nodes["backing"] = None
    return "json:" + json.dumps(nodes, separators=(",", ":"))


def path_of(fd: int) -> str:
    """The only kind of file name that qemu-img is ever given."""
    return f"/proc/self/fd/{fd}"


def raw_info(size_bytes: int, allocated_bytes: int) -> model.ImageInfo:
    """What there is to know of an image that the caller declared raw: nothing that is in it.

    Guests may write anything into their disks, so a declared raw image is never looked at. Its
    size is rounded up to sectors, as qemu does.
    """
    sectors = -(-size_bytes // SECTOR_BYTES)
    return model.ImageInfo(
        format="raw",
        virtual_size_bytes=sectors * SECTOR_BYTES,
        actual_size_bytes=allocated_bytes,
    )


def _source_cache(facts: Facts) -> model.ChosenCache:
    if facts.source_direct is None:
        reason = "the source can be read past the page cache"
        return model.ChosenCache(mode=model.CacheMode.NONE, reason=reason)
    reason = f"the source can't be read past the page cache: {facts.source_direct}"
    return model.ChosenCache(mode=model.CacheMode.WRITEBACK, reason=reason)


def _dest_cache(grant: model.Grant, facts: Facts) -> model.ChosenCache:
    asked = grant.request.cache_mode
    if asked is model.CacheMode.AUTO:
        if facts.dest_direct is None:
            reason = "the destination takes direct writes"
            return model.ChosenCache(mode=model.CacheMode.NONE, reason=reason)
        reason = f"the destination takes no direct writes: {facts.dest_direct}"
        return model.ChosenCache(mode=model.CacheMode.WRITEBACK, reason=reason)
    if asked in DIRECT_MODES and facts.dest_direct is not None:
        raise errors.Unsupported(
            what=f"cache mode {asked}",
            why=f"the destination takes no direct writes: {facts.dest_direct}",
        )
    return model.ChosenCache(mode=asked, reason="asked for")


def _options(
    grant: model.Grant, source_cache: model.ChosenCache, dest_cache: model.ChosenCache
) -> tuple[str, ...]:
    dest = grant.request.dest
    argv = ["qemu-img", "convert", "-p", "-t", dest_cache.mode.value]
    argv += ["-T", source_cache.mode.value, "-O", dest.format]
    if compresses(dest):
        argv += ["-c"]
    if dest.format == "raw" or compresses(dest):
        # Out of order is quicker, and fragments other formats' files.
        argv += ["-m", COROUTINES, "-W"]
    if grant.request.rate_limit_bytes_per_second:
        argv += ["-r", str(grant.request.rate_limit_bytes_per_second)]
    options = _create_options(dest)
    if options:
        argv += ["-o", ",".join(options)]
    return tuple(argv)


def compresses(dest: model.Dest) -> bool:
    """Whether the result is to be compressed, by whichever method."""
    return dest.compression is not model.Compression.NONE


def _create_options(dest: model.Dest) -> list[str]:
    options = []
    if dest.compression is model.Compression.ZSTD:
        options += ["compression_type=zstd"]
    if dest.preallocation is not model.Preallocation.OFF:
        options += [f"preallocation={dest.preallocation.value}"]
    if dest.format == "vpc":
        # Without it qemu rounds the size to what a disk of 1990 could have had.
        options += ["force_size=on"]
    return options


def _needed_bytes(grant: model.Grant, info: model.ImageInfo) -> int:
    """What the result will take at least. `qemu-img measure` would ask for far too much."""
    dest = grant.request.dest
    if dest.preallocation in {model.Preallocation.FALLOC, model.Preallocation.FULL}:
        return info.virtual_size_bytes
    if compresses(dest):
        return 0
    return min(info.actual_size_bytes, info.virtual_size_bytes)


def _warnings(info: model.ImageInfo) -> tuple[model.Warned, ...]:
    """What a conversion leaves behind without a word from qemu-img."""
    possible = (
        (info.snapshots, "SNAPSHOTS_DROPPED", f"{len(info.snapshots)} internal snapshots"),
        (info.bitmaps, "BITMAPS_DROPPED", f"{len(info.bitmaps)} bitmaps"),
    )
    dropped = [
        model.Warned(reason=reason, message=f"{what} of the source are not in the result")
        for found, reason, what in possible
        if found
    ]
    if info.dirty:
        message = "the source was not closed cleanly: its dirty flag is set"
        dropped.append(model.Warned(reason="SOURCE_DIRTY", message=message))
    return tuple(dropped)
