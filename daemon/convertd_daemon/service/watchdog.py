"""Tell systemd that we live, after having asked ourselves as a caller would.

A ping says that a health check was answered over the public socket: that the broker's loop
accepts and hands on, that the front relays, and that gRPC answers. The broker may not speak
gRPC, and the front may open no path; so the broker connects to its own socket and gives the
front the calling end, over which the front, as a client, checks the health of whoever answers.
A front that lies gains nothing but to stay.
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

    from convertd_daemon.broker.loop import Loop

log = logging.getLogger(__name__)

PROBES_PER_LIMIT: Final = 3
"""So often within the time after which systemd gives us up."""


def limit_s() -> float:
    """The time after which systemd wants to have heard of us, 0 if it doesn't ask.

    Source: sd_watchdog_enabled(3).
    """
    limit = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    return int(limit) / 1e6 if limit.isdecimal() and pid == str(os.getpid()) else 0.0


class Watchdog:
    """Probes the daemon from outside, and pings systemd for each probe that came through."""

    def __init__(
        self,
        loop: Loop,
        listening: socket.socket,
        send: Callable[[object, int], None],
        is_draining: Callable[[], bool],
    ) -> None:
        """Probe whoever accepts from this socket, once started.

        `send` gives the front a message and a descriptor. While the daemon drains nobody is
        accepted any more: then the loop alone vouches for it.
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
        """Somebody was let in, so that the backlog has room for a probe that found none.

        Others may see to it that it is full whenever else we look.
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
            log.warning("can't connect to ourselves error=%s", error)
        else:
            self._send(messages.Probe(probe=self._probe), descriptor)

    def on_answer(self, probe: int) -> None:
        """A probe came through, begun no longer ago than systemd waits for us.

        It may have been slow: a crowd was before it in the backlog. What counts is that we hear of
        it now, from a front that answered just before.
        """
        if probe > self._probe - PROBES_PER_LIMIT:
            notify.watchdog()
