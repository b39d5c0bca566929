"""The front's process, as the broker sees it: something to start, to feed, and not to trust."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
from typing import TYPE_CHECKING

from convertd_daemon import channel
from convertd_daemon.broker import front_process
from convertd_daemon.kernel import scm_rights

if TYPE_CHECKING:
    from convertd_daemon.sandbox.identity import Identity


class Front:
    """The running front: its process, our end of its channel, and what could not yet be sent.

    `sent` counts the messages that there was room for.

    Owns the channel and every descriptor it is asked to send.
    """

    def __init__(self, started: front_process.Started) -> None:
        """Take over a started front."""
        self.pid = started.pid
        self.line = channel.Channel(started.sock)
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
        """Close the channel, which ends the front, and whatever it has not been sent.

        Of the connections among that others have copies.
        """
        self.line.close()
        self._forget_all()

    def _forget_all(self) -> None:
        scm_rights.close_all([fd for _, fd in self._behind if fd is not None])
        self._behind.clear()

    def kill(self) -> None:
        """End it now. It is our child and not reaped yet, so the pid is its own."""
        os.kill(self.pid, signal.SIGKILL)


def start(user: Identity, private: str) -> Front:
    """Start a front; see front_process.start.

    Raises:
        OSError: no process, or no descriptors, to be had.
    """
    return Front(front_process.start(user, private))
