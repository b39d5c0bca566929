"""Run in a forked child what may block for ever: the child can be killed, the broker goes on."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, BinaryIO, Final, NoReturn

from convertd_daemon.linux import close_range
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
            child = forking.fork(lambda empty: _work(writer, work, limit_s, empty))
        finally:
            os.close(writer)
        try:
            yield reader
        finally:
            os.kill(child, signal.SIGKILL)
            forking.reap(child, _KILL_S)


def _work(
    writer: int,
    work: Callable[[BinaryIO], None],
    limit_s: float,
    child_is_empty: forking.Emptied,
) -> NoReturn:
    """All that the child does. A child that is left keeps none of the broker's descriptors."""
    status = 1
    try:
        close_range.close_all_but({0, 1, 2, writer, child_is_empty.writer})
        child_is_empty.tell()
        # Should the parent die meanwhile, the child still ends.
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        signal.setitimer(signal.ITIMER_REAL, limit_s + _KILL_S)
        with open(writer, "wb") as told:
            work(told)
        status = 0
    finally:
        os._exit(status)
