"""Whether a disk takes more through the page cache or past it: tried, on the new inode itself.

ext4 lets one direct write at a time allocate blocks in a file; the next one begins when the disk
has taken it. Through the page cache, the kernel has all of them on their way at once. On a disk
with much latency, that makes a factor of two; on a quick one, copying to the page cache costs more
than it gains. Source: Linux fs/ext4/file.c, ext4_dio_write_checks().
"""

from __future__ import annotations

import mmap
import os
import time
from typing import Final

from convertd_core import results, values
from convertd_daemon.job import stages
from convertd_daemon.linux import fstatfs, sync_file_range

PIECE_BYTES: Final = 2 * 1024 * 1024
"""What qemu-img writes at once, at most."""

PIECES: Final = 4

LEAST_BYTES: Final = 256 * 1024 * 1024
"""For less, no trial: it takes the disk as long as 16 MiB of a conversion."""

MEASURED: Final = frozenset({fstatfs.Magic.EXT4, fstatfs.Magic.XFS, fstatfs.Magic.BTRFS})
"""Local file systems in which going through the page cache has been measured, and pages that are on
disk can be dropped. tmpfs is the page cache; a server has a cache of its own."""


def is_worth_it(grant: values.ConvertGrant, plan: stages.ConversionPlan, fd: int) -> bool:
    """Whether the cache mode is ours to choose, and the result large enough to try which is right.

    What compresses is not as quick as a disk.
    """
    return (
        grant.request.cache_mode is values.CacheMode.AUTO
        and plan.dest_cache.mode is values.CacheMode.NONE
        and plan.compression is values.Compression.NONE
        and plan.method is results.Method.QEMU_IMG
        and not grant.request.rate_limit_bytes_per_second
        and plan.needed_bytes >= LEAST_BYTES
        and fstatfs.magic(fd) in MEASURED
    )


def write_rates(fd: int) -> stages.WriteRates | None:
    """Write some MiB to an empty inode past the page cache, and as many through it.

    None if that did not work. Leaves the inode empty.

    Raises:
        OSError: it could not be emptied again.
        ValueError: it is not empty, and would lose what it holds.
    """
    if os.fstat(fd).st_size:
        raise ValueError("the inode holds data")
    try:
        return _write_both(fd)
    except OSError:
        return None  # the conversion itself will tell
    finally:
        os.ftruncate(fd, 0)


def _write_both(fd: int) -> stages.WriteRates:
    size = PIECES * PIECE_BYTES
    os.ftruncate(fd, 2 * size)
    direct = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, PIECE_BYTES) as piece:
            piece.write(os.urandom(mmap.PAGESIZE) * (PIECE_BYTES // mmap.PAGESIZE))
            began = time.monotonic()
            _write(direct, piece, 0)
            turned = time.monotonic()
            _write(fd, piece, size)
            sync_file_range.write_and_wait(direct)
            ended = time.monotonic()
    finally:
        os.close(direct)
    return stages.WriteRates(
        direct_bytes_per_s=size / (turned - began), buffered_bytes_per_s=size / (ended - turned)
    )


def _write(fd: int, piece: mmap.mmap, start: int) -> None:
    for offset in range(start, start + PIECES * PIECE_BYTES, PIECE_BYTES):
        os.pwritev(fd, [piece], offset)
