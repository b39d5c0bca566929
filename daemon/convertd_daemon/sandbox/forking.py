"""Fork a child that closes what it was not to have before its parent goes on.

fork(2) gives a child a copy of each descriptor, so that for a moment it may be the last to have one
that the broker closes. What is behind it would then be cleaned up in the child, which may take as
long as a stranger likes: see closer.py. So the broker closes nothing before the child has.
"""

from __future__ import annotations

import contextlib
import os
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
        """In the child: all is closed but what it keeps, and `writer`, which goes now."""
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
    """Hold signals back in the parent until the child is in safe hands; in the child, for good.

    The child still has our handlers, and our wakeup descriptor to write to: a SIGTERM to it would
    be taken for our own. And a handler that raises here would leave behind a child that nobody
    knows.
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
