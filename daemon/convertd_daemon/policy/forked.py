"""Run what may block for ever in a forked child, which can be killed."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, BinaryIO, Final

from convertd_daemon.sandbox import forking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_KILL_S: Final = 1.0


@contextlib.contextmanager
def answer(work: Callable[[BinaryIO], None], limit_s: float) -> Iterator[int]:
    """Have a forked child write its answer into a pipe, whose other end this gives.

    In the end the child is killed and reaped; one that can't be killed now is reaped later, with
    the broker's orphans. Call it from a process without threads.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    with contextlib.closing(open(reader, "rb", buffering=0)):
        try:
            child = forking.fork(lambda: _work(writer, work, limit_s), keep=(writer,))
        finally:
            os.close(writer)
        try:
            yield reader
        finally:
            os.kill(child, signal.SIGKILL)
            forking.reap(child, _KILL_S)


def _work(writer: int, work: Callable[[BinaryIO], None], limit_s: float) -> None:
    """All that the child does."""
    # Should the parent die meanwhile, the child still ends.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    forking.unblock_signals()
    signal.setitimer(signal.ITIMER_REAL, limit_s + _KILL_S)
    with open(writer, "wb") as pipe:
        work(pipe)
