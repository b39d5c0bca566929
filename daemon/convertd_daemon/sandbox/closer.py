"""Close sockets to which strangers can send, without waiting for what they attached.

A peer can attach any descriptor to a byte that it sends. Whoever closes the last copy of the socket
with that byte unread also closes what is attached, and waits for it: for a TCP socket with
SO_LINGER and unsent data, as long as the peer chose. Since Linux 6.16 the kernel keeps descriptors
out of our sockets; before, and for what was sent before the daemon set that option, there is this.

A socket is shut down first, so that nothing comes any more. Where nothing unread has descriptors it
is closed. Else a process of its own gets a copy, the broker closes its own, and that process exits:
a process that exits does not linger. Source: Linux inet_release(), PF_EXITING. Nobody waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from typing import TYPE_CHECKING, Final, NoReturn

from convertd_daemon.linux import close_range, prctl, scm_rights
from convertd_daemon.sandbox import forking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

log = logging.getLogger(__name__)

BATCH_S: Final = 0.05
"""Those of so many seconds go to one process: strangers must not have us fork each time."""

AT_ONCE: Final = 128
"""So many go to one process at once, whenever the last one was forked."""

MOST_PROCESSES: Final = 16
"""So many at once. Each lives for a millisecond, unless what it closes hangs even at exit: a file
on a FUSE file system of the peer's, for one."""

MOST_HELD: Final = 512
"""With so many that wait for a process, nobody is accepted."""


class Closer:
    """The sockets that wait to be closed elsewhere, and the processes that do it."""

    def __init__(self, after: Callable[[float, Callable[[], None]], object]) -> None:
        """Begin with none. `after` calls something once, so many seconds later."""
        self._after = after
        # Numbers, not objects, which the interpreter would close itself at its end.
        self._held: list[int] = []
        self._is_due = False
        self.processes: set[int] = set()

    @property
    def is_full(self) -> bool:
        """Whether nothing more should come that may have to be closed."""
        return len(self._held) >= MOST_HELD

    def close(self, sock: socket.socket) -> None:
        """End a connection of which nobody else has a copy."""
        if not close_if_free(sock):
            self.take(sock)

    def take(self, sock: socket.socket) -> None:
        """Have a socket closed by a process that nobody waits for. It is the closer's from now on.

        Nobody else has a copy, or they die with it: who closes last would be the one that waits.
        """
        # Whoever has the other end hears of it now; and nothing more comes.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        self._held.append(sock.detach())
        if len(self._held) >= AT_ONCE:
            self._hand_on()
        else:
            self._schedule()

    def ended(self, pid: int) -> bool:
        """Take note that a process has ended, and say whether it was one of these."""
        if pid not in self.processes:
            return False
        self.processes.discard(pid)
        return True

    def _schedule(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._after(BATCH_S, self._when_due)

    def _when_due(self) -> None:
        self._is_due = False
        self._hand_on()
        if self._held:
            self._schedule()

    def _hand_on(self) -> None:
        """Have a process close all that is held, if there may be one more."""
        if not self._held or len(self.processes) >= MOST_PROCESSES:
            return
        try:
            self.processes.add(_fork(self._held))
        except OSError as error:
            log.warning("can't fork a process that closes sockets error=%s", error)
        else:
            log.info("closed connections with descriptors count=%d", len(self._held))
            self._held = []


def close_if_free(sock: socket.socket) -> bool:
    """Shut a connection down, and close it if no descriptor is attached to what is unread.

    Whoever else has a copy finds the same when it looks later, as nothing comes any more.
    """
    with contextlib.suppress(OSError):  # it was never connected, and nothing can be in it
        sock.shutdown(socket.SHUT_RDWR)
    if scm_rights.holds_none(sock):
        sock.close()
        return True
    return False


def _fork(held: Iterable[int]) -> int:
    """Fork a process that is the last to have these descriptors, and exits; they are closed here.

    Raises:
        OSError: there is no process, or no descriptors, to be had; nothing is closed.
    """
    reader, writer = os.pipe()
    try:
        pid = forking.fork(lambda child_is_empty: _exit_last(held, reader, child_is_empty))
        scm_rights.close_all(held)
    finally:
        os.close(reader)
        os.close(writer)
    return pid


def _exit_last(held: Iterable[int], reader: int, child_is_empty: forking.Emptied) -> NoReturn:
    """In the child: wait until the broker has closed its own copies, and exit with ours open."""
    try:
        prctl.set_name("convertd-closer")
        close_range.close_all_but({*held, reader, child_is_empty.writer})
        child_is_empty.tell()
        os.read(reader, 1)
    finally:
        os._exit(0)
