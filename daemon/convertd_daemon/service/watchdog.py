"""Ping systemd's watchdog after a health check over the public socket.

A ping means that the broker's loop accepts connections and hands them on, that the front relays
them, and that gRPC answers. The broker may not speak gRPC, and the front may open no path; so the
broker connects to its own socket and passes the client's end to the front, which does the health
check over it. A front that reports a false answer gains nothing but that it is not restarted.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING, Final

from convertd_core import messages
from convertd_daemon.service import notify

if TYPE_CHECKING:
    from collections.abc import Callable

    from convertd_daemon.loop import Loop

log = logging.getLogger(__name__)

PROBES_PER_LIMIT: Final = 3
"""How often within the time after which systemd restarts the daemon."""


def limit_s() -> float:
    """The time within which systemd expects a ping; 0 if it expects none.

    Source: sd_watchdog_enabled(3).
    """
    limit = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    return int(limit) / 1e6 if limit.isdecimal() and pid == str(os.getpid()) else 0.0


class Watchdog:
    """Probes the daemon from outside, and pings systemd for each probe that was answered."""

    def __init__(
        self,
        loop: Loop,
        listening: socket.socket,
        send: Callable[[object, int], None],
        is_draining: Callable[[], bool],
    ) -> None:
        """Probe through this listening socket, once started.

        `send` gives the front a message and a descriptor. While the daemon drains it accepts no
        connection: then it pings without a probe.
        """
        self._loop = loop
        self._address = listening.getsockname()
        self._send = send
        self._is_draining = is_draining
        self._interval_s = limit_s() / PROBES_PER_LIMIT
        self._probe = 0
        self._wants_room = False

    def tick(self) -> None:
        """Probe now and from now on, if systemd asked for it."""
        if not self._interval_s:
            return
        if self._is_draining():
            notify.watchdog()
        else:
            self._begin()
        self._loop.after(self._interval_s, self.tick)

    def on_accept(self) -> None:
        """A connection was accepted: retry a probe for which the backlog had no room.

        At any other moment other callers may have filled it again.
        """
        if self._wants_room:
            self._begin()

    def _begin(self) -> None:
        self._wants_room = False
        self._probe += 1
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
                sock.connect(self._address)
                descriptor = sock.detach()
        except BlockingIOError:
            self._wants_room = True
        except OSError as error:
            log.warning("watchdog can't connect to the daemon's own socket error=%s", error)
        else:
            self._send(messages.Probe(probe=self._probe), descriptor)

    def on_answer(self, probe: int) -> None:
        """A probe was answered; ping if it began within the time that systemd allows.

        It may have been slow, behind many others in the backlog. What counts is that the front
        answers now.
        """
        if probe > self._probe - PROBES_PER_LIMIT:
            notify.watchdog()
