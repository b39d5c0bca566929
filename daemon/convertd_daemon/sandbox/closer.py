"""Close a peer's sockets without blocking on descriptors that the peer attached.

A peer can attach any descriptor to a byte that it sends. The process that closes the last copy of
the socket with that byte unread also closes the attached descriptor, and may block: for a TCP
socket with SO_LINGER and unsent data, as long as the peer chose. Since Linux 6.16 the kernel keeps
descriptors out of our sockets; this is for older kernels, and for what was sent before the daemon
set that option.

A socket is shut down first, so that no more data arrives. If no unread data has descriptors, it is
closed. Else a separate process gets a copy, the broker closes its own, and that process exits: an
exiting process does not linger. Source: Linux inet_release(), PF_EXITING. The broker never waits
for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from typing import TYPE_CHECKING, Final

from convertd_daemon.linux import prctl, scm_rights
from convertd_daemon.sandbox import forking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

log = logging.getLogger(__name__)

BATCH_S: Final = 0.05
"""Sockets are collected for this long: a peer must not make us fork for each."""

AT_ONCE: Final = 128
"""This many go to one process at once, without waiting for BATCH_S."""

MOST_PROCESSES: Final = 16
"""At the same time. Each lives for a millisecond, unless what it closes hangs even at exit, as a
file on a FUSE file system of the peer's can."""

MOST_HELD: Final = 512
"""With this many waiting for a process, the broker accepts no connection."""


class Closer:
    """The sockets that wait to be closed by another process, and those processes."""

    def __init__(self, after: Callable[[float, Callable[[], None]], object]) -> None:
        """Begin with none. `after` calls something once, so many seconds later."""
        self._after = after
        # Numbers, not objects, which the interpreter would close itself at its end.
        self._held: list[int] = []
        self._is_due = False
        self.processes: set[int] = set()

    @property
    def is_full(self) -> bool:
        """Whether to accept no more connections for now."""
        return len(self._held) >= MOST_HELD

    def close(self, sock: socket.socket) -> None:
        """End a connection of which no other process has a copy."""
        if not close_if_free(sock):
            self.take(sock)

    def take(self, sock: socket.socket) -> None:
        """Have a socket closed by another process. The closer owns it from now on.

        No other process may keep a copy: the one that closes the last copy would block.
        """
        # The peer sees the end now, and no more data arrives.
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
        """Have a new process close all held sockets, unless there are too many processes."""
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

    Another process with a copy finds the same later, as no more data arrives.
    """
    with contextlib.suppress(OSError):  # it was never connected, and nothing can be in it
        sock.shutdown(socket.SHUT_RDWR)
    if scm_rights.holds_none(sock):
        sock.close()
        return True
    return False


def _fork(held: Iterable[int]) -> int:
    """Fork a process that keeps the last copies of these descriptors and exits; closes ours.

    Raises:
        OSError: there is no process, or no descriptors, to be had; nothing is closed.
    """
    reader, writer = os.pipe()
    try:
        pid = forking.fork(lambda: _exit_last(reader), keep=(*held, reader))
        scm_rights.close_all(held)
    finally:
        os.close(reader)
        os.close(writer)
    return pid


def _exit_last(reader: int) -> None:
    """In the child: wait until the broker has closed its own copies, and exit with ours open."""
    prctl.set_name("convertd-closer")
    os.read(reader, 1)
