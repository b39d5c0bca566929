"""The front's process, as the broker sees it: something to start, to feed, and not to trust."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
from typing import TYPE_CHECKING

from convertd_daemon import channel
from convertd_daemon.linux import scm_rights
from convertd_daemon.sandbox import front_process

if TYPE_CHECKING:
    from convertd_daemon.sandbox.identity import Identity


class FrontProcess:
    """The running front: its process, our end of its channel, and what could not yet be sent.

    `sent` counts the messages that there was room for.

    Owns the channel and every descriptor it is asked to send.
    """

    def __init__(self, started: front_process.Started) -> None:
        """Take over a started front."""
        self.pid = started.pid
        self.channel = channel.Channel(started.sock)
        self.sent = 0
        self._pending: collections.deque[tuple[bytes, int | None]] = collections.deque()

    @property
    def has_pending(self) -> bool:
        """Whether something waits for room in the channel."""
        return bool(self._pending)

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
        self._pending.append((data, descriptor))
        self.catch_up()

    def catch_up(self) -> None:
        """Send what waits, as far as there is room.

        Raises:
            channel.Closed: the front is gone.
        """
        while self._pending:
            data, descriptor = self._pending[0]
            rights = () if descriptor is None else (descriptor,)
            try:
                if not self.channel.send_bytes(data, *rights, wait=False):
                    return
            except channel.Closed:
                self._forget_all()
                raise
            self._pending.popleft()
            self.sent += 1
            if descriptor is not None:
                os.close(descriptor)

    def close(self) -> None:
        """Close the channel, which ends the front, and whatever it has not been sent.

        Of the connections among that others have copies.
        """
        self.channel.close()
        self._forget_all()

    def _forget_all(self) -> None:
        scm_rights.close_all([fd for _, fd in self._pending if fd is not None])
        self._pending.clear()

    def kill(self) -> None:
        """End it now. It is our child and not reaped yet, so the pid is its own."""
        os.kill(self.pid, signal.SIGKILL)


def start(user: Identity, private: str) -> FrontProcess:
    """Start a front; see front_process.start.

    Raises:
        OSError: no process, or no descriptors, to be had.
    """
    return FrontProcess(front_process.start(user, private))
