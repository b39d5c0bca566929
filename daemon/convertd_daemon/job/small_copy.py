"""Copy a small raw image, to raw or to qcow2, without running a program.

Most of the time of a conversion of 1 MiB goes into starting qemu-img in the sandbox, and into what
qemu-img does before it reads anything. Raw bytes need no parser, and of a qcow2 only its tables are
written. So what is small, and asks for nothing but that, the job copies itself: into the same
unnamed inode, which is published in the same way.

What is zero is left out as qemu-img leaves it out: holes, and clusters without anything but zeroes
(in a raw result: blocks of 4 KiB, as with `-S 4k`).
"""

from __future__ import annotations

import dataclasses
import errno
import os
from typing import TYPE_CHECKING, Final

from convertd_core import conditions, results, values
from convertd_daemon.job import stages
from convertd_daemon.job.files import data_ranges, image_locks
from convertd_daemon.job.reflink import qcow2_writer
from convertd_daemon.job.reflink.extents import Extent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convertd_daemon.job.context import JobContext
    from convertd_daemon.job.endpoints import Endpoints
    from convertd_daemon.job.reflink import sharing

MOST_BYTES: Final = 8 * values.MIB
"""Of data; holes are not counted."""

MOST_STRETCHES: Final = 256
"""Of data, between holes."""

BLOCK_BYTES: Final = 4096
"""The least run of zeroes that qemu-img leaves out. Source: qemu-img(1), convert -S."""

CHUNK_BYTES: Final = 64 * 1024
"""How much is read at a time; a whole cluster, where clusters are larger."""


def choose(grant: values.ConvertGrant, decision: sharing.Decision) -> sharing.Decision:
    """Decide whether the job copies the image itself, and say so in the plan. Writes nothing.

    If so, the source is locked from now on, as a qemu-img that reads it locks it.
    """
    if decision.layout is not None or not _is_enough(grant, decision.ends):
        return decision
    cache = results.CacheChoice(
        mode=values.CacheMode.WRITEBACK,
        reason="there is little data; it is flushed before the result gets its name",
    )
    plan = dataclasses.replace(
        decision.plan,
        method=results.Method.COPY,
        method_reason=f"the source is raw, with at most {MOST_BYTES // values.MIB} MiB of data",
        source_cache=cache,
        dest_cache=cache,
    )
    return dataclasses.replace(decision, plan=plan)


def _is_enough(grant: values.ConvertGrant, ends: Endpoints) -> bool:
    """Whether a copy gives what was asked for, is small, and disturbs no qemu."""
    try:
        return (
            _asks_for_no_more(grant, ends)
            and _is_small(ends.source.fd)
            # If another qemu uses it, qemu-img refuses it, and says why.
            and image_locks.lock_for_reading(ends.source.fd)
        )
    except OSError:
        # The file system has no locks, or does not tell where data is. qemu-img knows what to do.
        return False


def _asks_for_no_more(grant: values.ConvertGrant, ends: Endpoints) -> bool:
    """Whether a request is for nothing but the bytes of a raw file, in an image made by default."""
    request = grant.request
    dest = request.dest
    return (
        ends.chain[0].info.format == "raw"
        and ends.source.place.root.kind is values.RootKind.FILE
        and not ends.dest.on_device
        and request.cache_mode is values.CacheMode.AUTO
        and not request.rate_limit_bytes_per_second
        and (dest.format == "raw" or not qcow2_writer.problem(dest))
        and dest.preallocation is values.Preallocation.OFF
        and _grain_bytes(dest) >= BLOCK_BYTES
    )


def _grain_bytes(dest: values.Destination) -> int:
    """The least run of zeroes that can be left out of the result."""
    return BLOCK_BYTES if dest.format == "raw" else qcow2_writer.creation(dest).cluster_bytes


def _is_small(fd: int) -> bool:
    """Whether a file has little data. On a file system that knows of no holes, all of it is data.

    Raises:
        OSError: it can't be asked.
    """
    data_bytes = 0
    for number, (start, end) in enumerate(data_ranges.data_ranges(fd, os.fstat(fd).st_size)):
        data_bytes += end - start
        if data_bytes > MOST_BYTES or number >= MOST_STRETCHES:
            return False
    return True


def copy(
    grant: values.ConvertGrant, plan: stages.ConversionPlan, ends: Endpoints, context: JobContext
) -> None:
    """Write the destination, which is empty, and unlock the source. Flushes nothing to the disk.

    Raises:
        Cancelled, conditions.DurationExceeded: see JobContext.check.
        conditions.ReadFailed: the source can't be read.
        conditions.NoSpace, conditions.QuotaExceeded, conditions.WriteFailed: the destination can't
            be written.
    """
    try:
        _write(grant.request.dest, plan.virtual_size_bytes, ends, context)
    except OSError as error:
        path = ends.dest.place.path
        if error.errno == errno.ENOSPC:
            raise ends.dest.no_space(plan.needed_bytes) from error
        if error.errno == errno.EDQUOT:
            raise conditions.QuotaExceeded(path=path) from error
        raise conditions.WriteFailed(path=path, problem=os.strerror(error.errno or 0)) from error
    # To replace the source itself, under another name, is no use of it.
    image_locks.unlock(ends.source.fd)


def _write(asked: values.Destination, size: int, ends: Endpoints, context: JobContext) -> None:
    reader = _Reader(ends, _grain_bytes(asked), context)
    dest = ends.dest.fd
    if asked.format == "raw":
        for extent in reader.extents():
            reader.place(dest, extent.start_bytes, extent.start_bytes, extent.length_bytes)
        os.ftruncate(dest, size)
    else:
        creation = qcow2_writer.creation(asked)
        qcow2_writer.write(
            dest,
            size,
            creation,
            reader.extents(),
            lambda _, start, to, length: reader.place(dest, start, to, length),
        )


class _Reader:
    """Reads a raw file piece by piece, and writes what is asked of the piece that it has."""

    def __init__(self, ends: Endpoints, grain_bytes: int, context: JobContext) -> None:
        self._source = ends.source
        self._grain = grain_bytes
        self._zeroes = bytes(grain_bytes)
        self._chunk = max(grain_bytes, CHUNK_BYTES)
        self._context = context
        self._start = 0
        self._data = b""

    def extents(self) -> Iterator[Extent]:
        """What is not zero, in whole grains; the last may end with the file."""
        end = 0
        try:
            for first, last in data_ranges.data_ranges(self._source.fd, self._source.size_bytes):
                # Two stretches may share a grain.
                start = max(end, first - first % self._grain)
                end = min(last + -last % self._grain, self._source.size_bytes)
                for at in range(start, end, self._chunk):
                    self._context.check()
                    self._start = at
                    self._data = os.pread(self._source.fd, min(self._chunk, end - at), at)
                    yield from self._not_zero()
        except OSError as error:
            path, problem = self._source.place.path, os.strerror(error.errno or 0)
            raise conditions.ReadFailed(path=path, problem=problem) from error

    def _not_zero(self) -> Iterator[Extent]:
        """The runs of grains in the piece that are not zero."""
        first = None
        for at in range(0, len(self._data), self._grain):
            grain = self._data[at : at + self._grain]
            if grain != self._zeroes[: len(grain)]:
                first = at if first is None else first
            elif first is not None:
                yield self._extent(first, at)
                first = None
        if first is not None:
            yield self._extent(first, len(self._data))

    def _extent(self, first: int, end: int) -> Extent:
        start = self._start + first
        return Extent(start_bytes=start, length_bytes=end - first, offset_bytes=start)

    def place(self, dest: int, start: int, to: int, length: int) -> None:
        """Write a part of the piece that was read last."""
        at = start - self._start
        rest = memoryview(self._data)[at : at + length]
        while rest:
            written = os.pwrite(dest, rest, to)
            rest, to = rest[written:], to + written
