"""Refuse a source that changed while it was converted. Fails closed.

qemu-img reads a file piece by piece, and does not notice what another process writes meanwhile: a
result could have old data in one place and new data in another, with status 0. So size and time of
modification are asked of each file of the chain when it is opened, before anything of it is read,
and again when all has been read. A chmod or a link, which move ctime alone, is no change.

The kernel stamps a file with the tick of its clock (1 to 10 ms; finer since Linux 6.13), so that
two writes within one tick can't be told apart. So reading begins in a later tick than the stamp.

A snapshot can't change, and is not watched: see reflink.snapshot.

What this can't detect: a time set back with utimensat(2); stores into a shared mapping's pages
that were dirty when the file was opened; block devices, which have no such time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from typing import TYPE_CHECKING, Final

from convertd_core import conditions
from convertd_daemon.linux import statx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from convertd_daemon.job.files.opened_source import Source

TICK_NS: Final = 10_000_000
"""The longest tick: CONFIG_HZ=100."""

COARSE_NS: Final = 2 * 10**9
"""The coarsest stamp of a file system: FAT's. ext3's has whole seconds."""

NS_PER_S: Final = 10**9

_CLOCK_REALTIME_COARSE: Final = 5  # linux/time.h

BLAMED: Final = (
    *(conditions.ReadFailed, conditions.VerifyFailed, conditions.ConversionFailed),
    *(conditions.ImageRefused, conditions.FormatMismatch, conditions.WrongSecret),
)
"""What a conversion may fail of because its source changed."""


def opened(fd: int) -> statx.Content:
    """Size and time of a file that is about to be read.

    Returns once each later write will have another time: two ticks later at most, and two seconds
    where the file system counts whole seconds and the file was written just now.

    Raises:
        OSError: the kernel's own answer.
    """
    content = statx.content(fd)
    is_coarse = content.mtime_ns % NS_PER_S == 0
    until_ns = content.mtime_ns + (COARSE_NS if is_coarse else TICK_NS)
    # A time that lies further in the future was set by hand, or by another clock.
    while 0 <= until_ns - _coarse_now_ns() <= COARSE_NS + TICK_NS:
        time.sleep(TICK_NS / NS_PER_S / 4)
    return content


def _coarse_now_ns() -> int:
    """The clock with which the kernel stamps files. Source: Linux current_time()."""
    return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)


def check(sources: Sequence[Source]) -> None:
    """Hold each file against what it was when it was opened.

    Raises:
        conditions.SourceChanged: one was written to, or has another size.
    """
    for source in sources:
        problem = _change_of(source)
        if problem:
            raise conditions.SourceChanged(path=source.place.path, problem=problem)


@contextlib.contextmanager
def watched(sources: Sequence[Source], compare: Callable[[], None]) -> Iterator[None]:
    """Have what is done in the block count only if no source changed from its opening to the end.

    Where it failed of what was read, and a source changed, that is why. A backing file whose time
    alone moved may just have been touched, as Nova's image cache does each time an instance is
    made of it: then `compare`, which reads chain and result once more, tells. See compare_held.

    Raises:
        conditions.SourceChanged: one did.
    """
    try:
        yield
    except BLAMED as error:
        _raise_if_changed(sources, error)
        raise
    check(sources[:1])
    if any(_change_of(source) for source in sources[1:]):
        compare_held(sources, compare)


def compare_held(sources: Sequence[Source], compare: Callable[[], None]) -> None:
    """Compare, while nothing changes, what the chain holds now with what was made of it.

    Raises:
        conditions.SourceChanged: they differ, or a file changed once more, or its size did.
    """
    now = [_with_new_time(source) for source in sources]
    check(now)
    try:
        compare()
    except BLAMED as error:
        _raise_if_changed(sources, error)
        raise
    check(now)


def _with_new_time(source: Source) -> Source:
    """The file as it is now, of the size with which it was opened."""
    if source.opened is None:
        return source
    now = dataclasses.replace(opened(source.fd), size_bytes=source.opened.size_bytes)
    return dataclasses.replace(source, opened=now)


def _raise_if_changed(sources: Sequence[Source], error: conditions.ConvertError) -> None:
    try:
        check(sources)
    except conditions.SourceChanged as changed:
        raise changed from error


def _change_of(source: Source) -> str:
    """In one clause how a file differs from what was opened; empty if it does not."""
    if source.opened is None:
        return ""
    try:
        now = statx.content(source.fd)
    except OSError as error:
        return f"it can't be asked any more: {os.strerror(error.errno or 0)}"
    if now.size_bytes != source.opened.size_bytes:
        return f"it had {source.opened.size_bytes} bytes and has {now.size_bytes}"
    return "" if now.mtime_ns == source.opened.mtime_ns else "it was written to"
