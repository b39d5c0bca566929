"""Keep a front running, and exchange messages with it.

A front that ends is replaced. One that reads no messages is killed first. If several end before one
has served, the daemon gives up.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from typing import TYPE_CHECKING, Final, Protocol

from convertd_core import codec, conditions, messages
from convertd_daemon import channel, loop
from convertd_daemon.linux import getrandom, scm_rights

if TYPE_CHECKING:
    from collections.abc import Callable

    from convertd_daemon.sandbox.closer import Closer
    from convertd_daemon.sandbox.front_process import Started

log = logging.getLogger(__name__)

START_S: Final = 30.0

RESTARTS: Final = 5
"""So many fronts may die before one has served; then the daemon gives up."""

READS_S: Final = 10.0
"""A front that has messages waiting and takes none of them for so long is replaced. Sooner than
systemd's watchdog would replace all of us, jobs included."""

STOP_S: Final = 5.0

TOO_LONG: Final = conditions.Unsupported(what="a reply this long", why="no message can hold it")


class Events(Protocol):
    """What the supervisor reports."""

    def on_front_message(self, message: messages.FromFront) -> None:
        """The front sent a message."""

    def on_front_behind(self) -> None:
        """The front has unread messages: accept nothing new."""

    def on_front_caught_up(self) -> None:
        """The front has read them."""

    def on_front_disconnected(self) -> None:
        """The front has closed its channel, and is about to end."""

    def on_front_exit(self) -> None:
        """The front's process has ended, and with it its calls. Another is started after this."""

    def on_front_failed(self, why: str) -> None:
        """No other front is started."""


class FrontProcess:
    """The running front: its process, our end of its channel, and what could not yet be sent."""

    def __init__(self, started: Started, on_not_passed: Callable[[object], None]) -> None:
        """Take over a started front. See channel.SendQueue."""
        self.pid = started.pid
        self.channel = channel.Channel(started.sock)
        self.outbound = channel.SendQueue(self.channel, on_not_passed)

    def kill(self) -> None:
        """End it now. It is our child and not reaped yet, so the pid is its own."""
        os.kill(self.pid, signal.SIGKILL)


class FrontSupervisor:
    """Keeps a front alive, and takes and gives its messages.

    `is_last` says that no other is started when this one ends.
    """

    def __init__(
        self, a_loop: loop.Loop, closer: Closer, start: Callable[[], Started], events: Events
    ) -> None:
        """Begin without a front. `start` starts one."""
        self._loop = a_loop
        self._closer = closer
        self._start = start
        self._events = events
        self._front: FrontProcess | None = None
        self._timer: loop.Timer | None = None  # while it has not read what there is for it
        self._serves = False
        self._lost = 0
        self.is_last = False
        self._is_ending = False

    @property
    def pid(self) -> int:
        """Its process; 0 if there is none."""
        return 0 if self._front is None else self._front.pid

    @property
    def is_behind(self) -> bool:
        """Whether a message would not be sent at once."""
        return self._front is None or self._front.outbound.has_pending

    def watch(self, started: Started) -> None:
        """Supervise a front that was started, and must serve within START_S."""
        front = self._front = FrontProcess(started, self._on_not_passed)
        self._serves = False
        self._listen(front)
        self._loop.after(START_S, lambda: self._on_start_timeout(front))

    def on_ready(self) -> None:
        """Note that the front serves."""
        self._serves = True
        self._lost = 0

    def end(self) -> bool:
        """Let the front send its last replies and end; False if there is none."""
        if self._front is None:
            return False
        if not self._is_ending:
            ending, self._is_ending = self._front, True
            self._loop.forget(ending.channel.fileno())
            ending.channel.sock.shutdown(socket.SHUT_RDWR)
            self._loop.after(STOP_S, lambda: self._kill_if_left(ending))
        return True

    def _kill_if_left(self, front: FrontProcess) -> None:
        if self._front is front:
            front.kill()

    def _on_start_timeout(self, started: FrontProcess) -> None:
        if self._front is started and not self._serves and not self.is_last:
            log.error("the front did not begin to serve within %d s", START_S)
            started.kill()

    def send(self, message: object, descriptor: int | None = None) -> None:
        """Send the front a message. If the front is gone, it is lost."""
        front = self._front
        if front is None:
            scm_rights.close_all([] if descriptor is None else [descriptor])
            return
        try:
            front.outbound.send(message, descriptor)
        except channel.Closed:
            self._disconnect(front)
            return
        except channel.TooLong as error:
            # A caller in 65,536 groups, a policy of a megabyte: its call ends, and nothing else.
            log.warning("a reply does not fit into a message: %s", error)
            self._refuse(message, TOO_LONG)
        if front.outbound.has_pending and self._timer is None:
            # The front itself never waits to send. What waits for it stays within what the jobs
            # there are, and the watchdog, can make.
            self._loop.watch(front.channel.fileno(), loop.WRITE, lambda _: self._flush(front))
            self._events.on_front_behind()
            self._schedule_read_check(front)

    def _on_not_passed(self, message: object) -> None:
        """Handle a message whose descriptor was lost: a connection, or a job's channel."""
        log.warning("the kernel passes no descriptor to the front: too many are in flight")
        self._refuse(message, conditions.InternalError(error_id=getrandom.hex_name(6)))

    def _refuse(self, message: object, why: conditions.ConvertError) -> None:
        """End the call for which a message was, if it was for one."""
        if isinstance(message, messages.Reply):
            refused = messages.Refused(failure=why.failure())
            self.send(messages.Reply(call=message.call, body=refused))

    def _schedule_read_check(self, front: FrontProcess) -> None:
        sent = front.outbound.sent
        self._timer = self._loop.after(READS_S, lambda: self._check_reads(front, sent))

    def _check_reads(self, front: FrontProcess, sent: int) -> None:
        # There may be room of which epoll says nothing until there is more.
        self._flush(front)
        if self._timer is not None and front.outbound.sent > sent:
            self._schedule_read_check(front)
        elif self._timer is not None:
            log.error("the front does not read its messages")
            front.kill()

    def _flush(self, front: FrontProcess) -> None:
        """Send what waits, and report when nothing waits any more."""
        try:
            front.outbound.flush()
        except channel.Closed:
            self._disconnect(front)
            return
        if not front.outbound.has_pending:
            self._cancel_timer()
            self._listen(front)
            self._events.on_front_caught_up()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _listen(self, front: FrontProcess) -> None:
        self._loop.watch(front.channel.fileno(), loop.READ, lambda _: self._receive(front))

    def _receive(self, front: FrontProcess) -> None:
        """Take one message."""
        try:
            message, _ = front.channel.receive(*messages.FROM_FRONT, wait=False)
        except BlockingIOError:
            return
        except channel.Closed:
            self._disconnect(front)
        except codec.CodecError:
            # We made it and it does not speak our language: it is no longer ours.
            log.exception("invalid message from the front")
            self._disconnect(front)
        else:
            self._events.on_front_message(message)

    def _disconnect(self, front: FrontProcess) -> None:
        """Kill a front that has closed its channel: an honest one ends now anyway."""
        if self._is_ending:
            return  # we closed it ourselves, and the front has time to end
        self._loop.forget(front.channel.fileno())
        self._events.on_front_disconnected()
        front.kill()

    def on_exit(self, pid: int, status: int) -> bool:
        """Note that a process has ended; return whether it was the front."""
        front = self._front
        if front is None or front.pid != pid:
            return False
        log.info("front ended pid=%d status=%d", pid, status)
        self._loop.forget(front.channel.fileno())
        # What it sent us at the last may have descriptors with it.
        self._closer.take(front.channel.sock)
        front.outbound.clear()
        self._front = None
        self._cancel_timer()
        self._events.on_front_exit()
        if self.is_last:
            return True
        self._lost += 1
        if self._lost > RESTARTS:
            self._events.on_front_failed("the front ended repeatedly; see the journal")
            return True
        log.error("the front ended; starting another")
        self.watch(self._start())
        return True
