"""Accept connections, hand them to the front, and drop them when either end has closed them."""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING, Final

from convertd_core import messages
from convertd_daemon import loop

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from convertd_daemon import channel
    from convertd_daemon.broker.connections import Connection, Connections

log = logging.getLogger(__name__)

CLOSING_S: Final = 0.2
"""How long accepting pauses while many connections wait to be closed by another process."""

ENDED_AT_ONCE: Final = 16
"""The most connections that are accepted and closed at once in one round of the loop: 1 ms."""

OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Acceptor:
    """Accepts connections from the listening socket's backlog, and hands them to the front."""

    def __init__(  # noqa: PLR0913 - the parts that it joins
        self,
        a_loop: loop.Loop,
        listening: socket.socket,
        table: Connections,
        front: channel.Sender,
        *,
        on_accept: Callable[[], None],
        on_disconnect: Callable[[Connection], None],
    ) -> None:
        """Accept nothing until `start`.

        `on_accept` is called for each connection that was accepted, kept or not; `on_disconnect`
        when one is dropped, and no message names it any more.
        """
        self._loop = a_loop
        self._listening = listening
        self._connections = table
        self._front = front
        self._on_accept = on_accept
        self._on_disconnect = on_disconnect
        self._is_started = False

    def start(self) -> None:
        """Accept connections from now on."""
        self._is_started = True
        self.resume()

    def stop(self) -> None:
        """Accept nothing until the next `start`: new connections wait in the backlog."""
        self._is_started = False
        self.pause()

    def pause(self) -> None:
        """Accept nothing until `resume`."""
        self._loop.forget(self._listening.fileno())

    def resume(self) -> None:
        """Accept again, if `start` was called and the front reads its messages."""
        if self._is_started and not self._front.is_behind:
            self._loop.watch(self._listening.fileno(), loop.READ, self._accept)

    def _accept(self, _events: int) -> None:
        """Accept one connection, and hand it to the front.

        One in each round of the loop, in which one message of the front is read too: a peer that
        connects as fast as it can must not delay the requests of others. Connections that are
        closed at once take less time, so several are accepted in a round.
        """
        for _ in range(ENDED_AT_ONCE):
            if self._connections.is_closing_many:
                log.warning("too many connections with descriptors wait to be closed")
                self._pause_for(CLOSING_S)
                return
            try:
                sock, _ = self._listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in OUT_OF_DESCRIPTORS:
                    log.warning("can't accept error=%s", error)
                    self._pause_for(1.0)
                return  # else the peer was gone before we came. Source: accept(2)
            self._on_accept()
            if self._admit(sock):
                return

    def _pause_for(self, seconds: float) -> None:
        self.pause()
        self._loop.after(seconds, self.resume)

    def _admit(self, sock: socket.socket) -> bool:
        """Keep a descriptor of a connection, and send the front another; False if it was closed."""
        try:
            connection = self._connections.admit(sock)
            if connection is None:
                return False
        except OSError as error:
            log.info("peer disconnected at once error=%s", error)
            return False
        try:
            theirs = os.dup(sock.fileno())
        except OSError as error:
            log.warning("can't pass a connection to the front error=%s", error)
            self._connections.drop(connection)
            return False
        self._loop.watch(sock.fileno(), loop.PEER_GONE, lambda _: self._drop(connection))
        came = messages.Connected(connection=connection.number, uid=connection.uid)
        self._front.send(came, theirs)
        return True

    def _drop(self, connection: Connection) -> None:
        """Drop a connection that its peer or the front has closed."""
        self._loop.forget(connection.sock.fileno())
        self._connections.drop(connection)
        self._on_disconnect(connection)

    def on_released(self, number: int) -> None:
        """Drop a connection of which the front has closed its descriptor, if it still exists."""
        connection = self._connections.kept(number)
        if connection is not None:
            self._drop(connection)
        self._connections.released(number)

    def on_front_exit(self) -> None:
        """Drop all connections, and accept nothing: there is no front."""
        self.stop()
        for connection in self._connections:
            self._drop(connection)
        self._connections.all_released()
