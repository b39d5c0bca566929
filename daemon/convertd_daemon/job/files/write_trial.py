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
from convertd_daemon.job.qemu import cache_modes
from convertd_daemon.linux import fstatfs, sync_file_range

PIECE_BYTES: Final = 2 * 1024 * 1024
"""What qemu-img writes at once, at most."""

PIECES: Final = 2

ROUNDS: Final = 3
"""The page cache has to win each. On a busy disk, every fifth round ends so by chance (2026-11); a
result that then goes through the page cache takes up to twice as long as past it."""

LEAST_BYTES: Final = 256 * 1024 * 1024
"""For less, no trial: a round takes the disk as long as 8 MiB of a conversion."""

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

    Gives the first round that the page cache does not win by cache_modes.GAIN, or else the last
    one; None if it did not work. Leaves the inode empty.

    Raises:
        OSError: it could not be emptied again.
        ValueError: it is not empty, and would lose what it holds.
    """
    if os.fstat(fd).st_size:
        raise ValueError("the inode holds data")
    try:
        return _decisive_round(fd)
    except OSError:
        return None  # the conversion itself will tell
    finally:
        os.ftruncate(fd, 0)


def _decisive_round(fd: int) -> stages.WriteRates:
    direct = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, PIECE_BYTES) as piece:
            piece.write(os.urandom(mmap.PAGESIZE) * (PIECE_BYTES // mmap.PAGESIZE))
            rates = _round(fd, direct, piece, 0)
            for number in range(1, ROUNDS):
                if not cache_modes.is_quicker_buffered(rates):
                    break
                rates = _round(fd, direct, piece, number * 2 * PIECES * PIECE_BYTES)
            return rates
    finally:
        os.close(direct)


def _round(fd: int, direct: int, piece: mmap.mmap, start: int) -> stages.WriteRates:
    """Write in both ways from `start` on, where the file has no blocks yet."""
    size = PIECES * PIECE_BYTES
    os.ftruncate(fd, start + 2 * size)
    began = time.monotonic()
    _write(direct, piece, start)
    turned = time.monotonic()
    _write(fd, piece, start + size)
    sync_file_range.write_and_wait(direct)
    ended = time.monotonic()
    return stages.WriteRates(
        direct_bytes_per_s=size / (turned - began), buffered_bytes_per_s=size / (ended - turned)
    )


def _write(fd: int, piece: mmap.mmap, start: int) -> None:
    for offset in range(start, start + PIECES * PIECE_BYTES, PIECE_BYTES):
        os.pwritev(fd, [piece], offset)
