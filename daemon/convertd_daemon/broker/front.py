"""The front's process, as the broker sees it: something to start, to feed, and not to trust."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Final, NoReturn

from convertd_daemon import channel
from convertd_daemon.kernel import close_range, prctl
from convertd_daemon.sandbox import identity

if TYPE_CHECKING:
    from convertd_daemon.sandbox.identity import Identity

CHANNEL_DESCRIPTOR: Final = 3


class Front:
    """The running front: its process, our end of its channel, and what could not yet be sent.

    `sent` counts the messages that there was room for.

    Owns the channel and every descriptor it is asked to send.
    """

    def __init__(self, pid: int, line: channel.Channel) -> None:
        """Take over a started front."""
        self.pid = pid
        self.line = line
        self.sent = 0
        self._behind: collections.deque[tuple[bytes, int | None]] = collections.deque()

    @property
    def is_behind(self) -> bool:
        """Whether something waits for room in the channel."""
        return bool(self._behind)

    def send(self, message: object, descriptor: int | None = None) -> None:
        """Send a message, with a descriptor that is then closed here; later, if there is no room.

        Raises:
            channel.Closed: the front is gone.
            channel.TooLong: the message can't be sent.
        """
        with contextlib.ExitStack() as unsent:
            if descriptor is not None:
                unsent.callback(os.close, descriptor)
            data = channel.encoded(message)
            unsent.pop_all()
        self._behind.append((data, descriptor))
        self.catch_up()

    def catch_up(self) -> None:
        """Send what waits, as far as there is room.

        Raises:
            channel.Closed: the front is gone.
        """
        while self._behind:
            data, descriptor = self._behind[0]
            rights = () if descriptor is None else (descriptor,)
            try:
                if not self.line.send_bytes(data, *rights, wait=False):
                    return
            except channel.Closed:
                self._forget_all()
                raise
            self._behind.popleft()
            self.sent += 1
            if descriptor is not None:
                os.close(descriptor)

    def close(self) -> None:
        """Close the channel, which ends the front, and whatever it has not been sent."""
        self.line.close()
        self._forget_all()

    def _forget_all(self) -> None:
        channel.close_all([fd for _, fd in self._behind if fd is not None])
        self._behind.clear()

    def end(self) -> None:
        """End it now and see it gone, unless it is, and closed."""
        if self.line.fileno() >= 0:
            self.kill()
            os.waitpid(self.pid, 0)
            self.close()

    def kill(self) -> None:
        """End it now. It is our child and not reaped yet, so the pid is its own."""
        os.kill(self.pid, signal.SIGKILL)


def start(user: Identity, private: str) -> Front:
    """Start the front as its own user, with one descriptor, and a directory for its own socket.

    Raises:
        OSError: no process, or no descriptors, to be had.
    """
    ours, theirs = channel.Channel.pair()
    pid = os.fork()
    if pid == 0:
        _become_front(user, theirs.fileno(), private)
    theirs.close()
    return Front(pid, ours)


def _become_front(user: Identity, descriptor: int, private: str) -> NoReturn:
    """In the child: give up root for good, then execute. No byte of gRPC is loaded before that."""
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        # The terminal's Ctrl-C is for the broker, which then ends us in its own time.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if descriptor != CHANNEL_DESCRIPTOR:
            os.dup2(descriptor, CHANNEL_DESCRIPTOR)
        os.set_inheritable(CHANNEL_DESCRIPTOR, True)
        close_range.close_all_but({0, 1, 2, CHANNEL_DESCRIPTOR})
        identity.assume(user)
        identity.limit_capabilities(())
        prctl.set_no_new_privs()
        os.chdir("/")
        environment = {
            **{key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"},
            # Its atfork handlers are for programs that fork; this one can't. Source: grpc's
            # doc/fork_support.md.
            "GRPC_ENABLE_FORK_SUPPORT": "0",
            # gRPC's core logs what a peer says, newlines and all: whoever could connect could write
            # any line into our log. Source: grpc's doc/environment_variables.md.
            "GRPC_VERBOSITY": "NONE",
            # Each piece that the relay takes from a peer begins as 64 KiB. In the heap, small
            # things came to lie in the gaps between, and it grew by 1.1 KiB a call; where such
            # pieces have mappings of their own, it stays as it is (2,100 calls, 2026-11).
            "MALLOC_MMAP_THRESHOLD_": "32768",
            "MALLOC_ARENA_MAX": "1",
        }
        argv = [sys.executable, "-m", "convertd_daemon.front", private]
        os.execve(sys.executable, argv, environment)
    finally:
        os._exit(127)
