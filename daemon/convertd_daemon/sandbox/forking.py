"""Fork a child that closes the descriptors that it must not have before the parent goes on.

fork(2) gives a child a copy of each descriptor, so that for a moment it may hold the last copy of
one that the broker closes. Closing that copy can block the child for as long as a peer likes: see
closer.py. So the broker waits until the child has closed its copies.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from typing import TYPE_CHECKING, Final

from convertd_daemon.linux import prctl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import NoReturn

ALL_SIGNALS: Final = signal.valid_signals()


class Emptied:
    """A pipe to be made before fork(2). Parent and child each call one of the methods, once.

    Attributes:
        parent: the pid of the process that forks.
        writer: what the child must not close before it calls `tell`.
    """

    def __init__(self) -> None:
        self.parent = os.getpid()
        self._reader, self.writer = os.pipe()

    def tell(self) -> None:
        """In the child, once all but its own and `writer` is closed: close `writer` too."""
        os.close(self.writer)

    def wait(self) -> None:
        """In the parent: wait for that, or for the child's death. It takes about a millisecond."""
        os.close(self.writer)
        os.read(self._reader, 1)
        os.close(self._reader)

    def give_up(self) -> None:
        """In the parent: there is no child."""
        os.close(self.writer)
        os.close(self._reader)


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


def fork(child: Callable[[Emptied], NoReturn]) -> int:
    """Fork, and give the pid when the child has told that it is empty, or is dead.

    `child` runs in it with all signals blocked. It first closes all but its own, calls `tell`, and
    sets another wakeup descriptor; it never returns.

    Raises:
        OSError: no process, or no descriptors, to be had.
    """
    child_is_empty = Emptied()
    try:
        with signals_blocked():
            pid = os.fork()
            if pid == 0:
                child(child_is_empty)
    except OSError:
        child_is_empty.give_up()
        raise
    child_is_empty.wait()
    return pid


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
