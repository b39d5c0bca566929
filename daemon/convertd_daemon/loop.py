"""An event loop for one thread: descriptors by epoll(7), timers, signals."""

from __future__ import annotations

import heapq
import os
import select
import signal
import socket
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    Handler = Callable[[int], None]

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
PEER_GONE = select.EPOLLRDHUP

MANY_TIMERS = 256
"""So many more than lived at the last sweep, and cancelled ones are swept out."""


class Timer:
    """A call at a time to come, unless it is cancelled."""

    __slots__ = ("action", "due")

    def __init__(self, due: float, action: Callable[[], None]) -> None:
        """Due at a time of the monotonic clock, in seconds."""
        self.due = due
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """Cancel it, and release what it refers to."""
        self.action = None

    def __lt__(self, other: Timer) -> bool:
        return self.due < other.due


class Loop:
    """Calls handlers with the events of their descriptors, one after the other, until stopped.

    A handler that raises ends the loop: what a handler can expect to go wrong it deals with.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._timers: list[Timer] = []
        self._live_at_last_sweep = 0
        self._signals: dict[int, Callable[[], None]] = {}
        self._running = True

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        """Call the handler at one of the events, or a hang-up; or change what to wait for."""
        if fd in self._handlers:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def forget(self, fd: int) -> None:
        """Watch a descriptor no longer. Before it is closed: others may hold copies of it."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def after(self, seconds: float, action: Callable[[], None]) -> Timer:
        """Call something once, later, unless it is cancelled until then."""
        timer = Timer(time.monotonic() + seconds, action)
        heapq.heappush(self._timers, timer)
        if len(self._timers) > 2 * self._live_at_last_sweep + MANY_TIMERS:
            self._sweep()
        return timer

    def on_signals(self, actions: dict[int, Callable[[], None]]) -> None:
        """Call something when a signal came, from the loop, never in between."""
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        self._signals = actions
        self._signal_ends = (reader, writer)
        for number in actions:
            signal.signal(number, _noted_by_the_wakeup_fd)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self.watch(reader.fileno(), READ, self._signalled)

    def stop(self) -> None:
        """Return from `run` after the present handler."""
        self._running = False

    def run(self) -> None:
        """Serve until `stop`."""
        while self._running:
            for fd, events in self._epoll.poll(self._patience()):
                # An earlier handler of this round may have closed what this event was for.
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler(events)
            while self._timers and self._timers[0].due <= time.monotonic():
                action = heapq.heappop(self._timers).action
                if action is not None:
                    action()

    def _sweep(self) -> None:
        """Drop the timers that were cancelled: most are, long before they are due."""
        self._timers = [timer for timer in self._timers if timer.action is not None]
        heapq.heapify(self._timers)
        self._live_at_last_sweep = len(self._timers)

    def _patience(self) -> float | None:
        return max(0.0, self._timers[0].due - time.monotonic()) if self._timers else None

    def _signalled(self, _events: int) -> None:
        for number in set(os.read(self._signal_ends[0].fileno(), 4096)):
            self._signals[number]()


def _noted_by_the_wakeup_fd(_number: int, _frame: object) -> None:
    """Do nothing: Python has written the number to the wakeup descriptor already."""
