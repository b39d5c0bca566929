"""Fork a child that closes the descriptors that it must not have before the parent goes on.

fork(2) gives a child a copy of each descriptor, so that for a moment it may hold the last copy of
one that the broker closes. Closing that copy can block the child for as long as a peer likes: see
closer.py. So the broker waits until the child has closed its copies.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
from typing import TYPE_CHECKING, Final

from convertd_daemon.linux import close_range, prctl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import NoReturn

log = logging.getLogger(__name__)

ALL_SIGNALS: Final = signal.valid_signals()

STANDARD: Final = frozenset({0, 1, 2})

_HANDLED: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
"""The signals for which the broker has handlers."""


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends; do it now if that has happened.

    Every change of a uid or gid, setfsuid(2) included, disarms this: call it after the last one.
    Source: PR_SET_PDEATHSIG(2const).
    """
    prctl.set_pdeathsig(signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block all signals: in the parent until the block ends, in the child until it unblocks them.

    The child still has the parent's handlers and wakeup descriptor: the parent would take a SIGTERM
    to the child for its own. And a handler that raised here would lose track of the child.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock_signals() -> None:
    """In a child that was forked here: take signals from now on."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def fork(child: Callable[[], None], *, keep: Iterable[int] = ()) -> int:
    """Fork, and give the pid when the child has closed its copies of descriptors, or is dead.

    `child` runs in it, with the standard three and the descriptors `keep`, and none of the parent's
    signal handlers; all signals are blocked. When it returns, the process exits with status 0, and
    with 1 when it raises.

    Raises:
        OSError: no process, or no descriptors, to be had.
    """
    reader, writer = os.pipe()
    with contextlib.closing(open(reader, "rb", buffering=0)) as closed_copies:
        try:
            with signals_blocked():
                pid = os.fork()
                if pid == 0:
                    _run(child, {*STANDARD, *keep}, writer)
        finally:
            os.close(writer)
        closed_copies.read(1)  # about a millisecond
    return pid


def _run(child: Callable[[], None], keep: set[int], writer: int) -> NoReturn:
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in _HANDLED:
            signal.signal(number, signal.SIG_DFL)
        close_range.close_all_but({*keep, writer})
        os.close(writer)
        child()
        status = 0
    except BaseException:
        log.exception("a forked process failed")
    finally:
        # Whatever happens: a child must never return into the parent's code.
        os._exit(status)


def reap(pid: int, limit_s: float) -> bool:
    """Wait so long for a child of ours to end, and reap it; False if it still lives."""
    pidfd = os.pidfd_open(pid)
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        poller.poll(limit_s * 1000)
    finally:
        os.close(pidfd)
    return os.waitpid(pid, os.WNOHANG)[0] == pid
