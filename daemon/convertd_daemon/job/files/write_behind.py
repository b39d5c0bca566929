"""Have a result that is written through the page cache reach the disk as it goes, and leave it.

Else a result fills the memory that belongs to guests, and its fsync(2) at the end makes them wait.
A process of its own does it while qemu-img runs: a disk that is slow, or does not answer, blocks
sync_file_range(2), and the job must be able to tell its caller so.

Nothing depends on it but the use of memory: whether a result is on disk is what fsync(2) tells the
job, of its own open file description.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, Final

from convertd_daemon.linux import prctl, sync_file_range
from convertd_daemon.sandbox import forking

if TYPE_CHECKING:
    from collections.abc import Iterator

INTERVAL_S: Final = 0.05
"""From the end of one pass to the next: 1 GiB/s leaves 50 MiB in memory meanwhile."""

LEAST_BYTES: Final = 64 * 1024 * 1024
"""Less is flushed soon enough by fsync(2), and a process is more than it is worth."""

NAME: Final = "convertd-flush"


@contextlib.contextmanager
def running(fd: int) -> Iterator[None]:
    """Write a file to disk, and drop it from the page cache, for the length of the block.

    Raises:
        OSError: no process is to be had.
    """
    parent = os.getpid()
    # A signal that is handled in between, and ends the job, would leave an unknown child.
    with forking.signals_blocked():
        pid = forking.fork(lambda: _write_behind(fd, parent), keep=(fd,))
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def drop(fd: int) -> None:
    """Drop a flushed file from the page cache."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _write_behind(fd: int, parent: int) -> None:
    """In the child, with all signals blocked: go on until killed, or until a write fails.

    The job shares this open file description, and must be told of the error: so nothing here waits
    for writes, which would take that from it.
    """
    forking.die_with(parent)
    prctl.set_name(NAME)
    with contextlib.suppress(OSError):
        while True:
            time.sleep(INTERVAL_S)
            # What the disk has taken meanwhile is clean, and can be dropped.
            drop(fd)
            sync_file_range.begin_write(fd)
