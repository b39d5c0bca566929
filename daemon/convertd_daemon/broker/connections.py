"""The accepted connections: who opened each, as the kernel reports it, and how many there may be.

The broker keeps its own descriptor of each connection while the front has another: that is how it
learns that the peer is gone, whatever the front says. It is also the last to close its own where
somebody attached descriptors to what is unread: see closer.py.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from convertd_core import values
from convertd_daemon.linux import peercred, proc_pid, scm_rights
from convertd_daemon.sandbox import closer
from convertd_daemon.service import audit

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

log = logging.getLogger(__name__)

WARN_AGAIN_S: Final = 1.0

MOST_WARNED: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """One accepted connection, and who called connect(2) for it."""

    number: int
    sock: socket.socket
    uid: int
    gid: int
    pid: int
    caller: audit.Caller

    def peer(self) -> values.Peer:
        """The peer with all its groups: up to 65,536, so they are queried each time and not kept.

        The kernel reports those of connect(2).

        Raises:
            OSError: the kernel can't report them.
        """
        groups = peercred.peer_groups(self.sock)
        return values.Peer(uid=self.uid, gid=self.gid, groups=groups, pid=self.pid)


class Connections:
    """All connections by number. Numbers are never used twice."""

    def __init__(self, limits: values.Limits, closing: closer.Closer) -> None:
        self.limits = limits
        self._closer = closing
        self.prober = 0
        """The pid whose connections are never too many: our own, for the watchdog's probe."""
        self._by_number: dict[int, Connection] = {}
        self._leaving: dict[int, Connection] = {}
        """Dropped ones with descriptors attached, which the front still has open. They count."""
        self._per_user: Counter[int] = Counter()
        self._warned: dict[int, float] = {}
        """When it was last logged that a user has too many."""
        self._in: dict[int, tuple[frozenset[int], frozenset[int]]] = {}
        """By connection: the groups that were queried, and those of them that the peer is in."""
        self._numbers = itertools.count(1)

    def __iter__(self) -> Iterator[Connection]:
        return iter(tuple(self._by_number.values()))

    def __len__(self) -> int:
        return len(self._by_number)

    @property
    def is_closing_many(self) -> bool:
        """Whether too many connections wait to be closed by another process."""
        return self._closer.is_full

    def find(self, number: int) -> Connection | None:
        """The connection of that number, if it is open and requests may come over it.

        Not over our own probe: its credentials are root's, and its other end is the front's.
        """
        found = self._by_number.get(number)
        return None if found is None or found.pid == self.prober else found

    def kept(self, number: int) -> Connection | None:
        """The connection of that number, our own probe's too, if it is open."""
        return self._by_number.get(number)

    def peer_among(self, connection: Connection, gids: frozenset[int]) -> values.Peer:
        """The peer, with those of these groups that it is in.

        They are queried once for each policy: reading 65,536 groups takes milliseconds, and a peer
        may call without end.

        Raises:
            OSError: the kernel can't report them.
        """
        asked, found = self._in.get(connection.number, (None, frozenset[int]()))
        if asked != gids:
            found = gids and gids & connection.peer().groups
            self._in[connection.number] = gids, found
        return values.Peer(uid=connection.uid, gid=connection.gid, groups=found, pid=connection.pid)

    def admit(self, sock: socket.socket) -> Connection | None:
        """Keep a connection, with its peer's credentials; None, and closed, if there are too many.

        It is closed too if its peer has closed it while it waited, before it costs the front
        anything.

        Raises:
            OSError: the peer is gone already. The socket is closed.
        """
        try:
            scm_rights.inline_oob(sock)
            # It may have been connected before the listening socket had that.
            scm_rights.refuse(sock)
            peer = peercred.peer_credentials(sock)
        except OSError:
            self._closer.close(sock)
            raise
        if peercred.has_hung_up(sock):
            self._closer.close(sock)
            return None
        total, own = len(self) + len(self._leaving), self._per_user[peer.uid]
        # Our own probe: a daemon with many callers is not a dead one.
        is_probe = peer.pid == self.prober
        full = total >= self.limits.connections or own >= self.limits.connections_per_user
        if full and not is_probe:
            self._warn(peer.uid, own, total)
            self._closer.close(sock)
            return None
        comm, unit = proc_pid.name_and_unit(peer.pid, peer.uid, peer.gid)
        who = audit.Caller(uid=peer.uid, gid=peer.gid, pid=peer.pid, comm=comm, unit=unit)
        connection = Connection(
            number=next(self._numbers),
            sock=sock,
            uid=peer.uid,
            gid=peer.gid,
            pid=peer.pid,
            caller=who,
        )
        self._by_number[connection.number] = connection
        self._per_user[peer.uid] += 1
        return connection

    def drop(self, connection: Connection) -> None:
        """End a connection, and close our descriptor as soon as that can't block."""
        del self._by_number[connection.number]
        self._in.pop(connection.number, None)
        if closer.close_if_free(connection.sock):
            self._uncount(connection)
        else:
            self._leaving[connection.number] = connection

    def released(self, number: int) -> None:
        """Close our descriptor of a dropped connection: the front has closed its own."""
        connection = self._leaving.pop(number, None)
        if connection is not None:
            log.warning("descriptors attached uid=%d pid=%d", connection.uid, connection.pid)
            self._closer.take(connection.sock)
            self._uncount(connection)

    def all_released(self) -> None:
        """Close our descriptors of all dropped connections: there is no front."""
        for number in tuple(self._leaving):
            self.released(number)

    def _warn(self, uid: int, own: int, total: int) -> None:
        """Log that a user has too many, at most once a second."""
        now = time.monotonic()
        if now - self._warned.get(uid, -WARN_AGAIN_S) < WARN_AGAIN_S:
            return
        log.warning("too many connections uid=%d own=%d total=%d", uid, own, total)
        if len(self._warned) >= MOST_WARNED:
            self._warned.clear()
        self._warned[uid] = now

    def _uncount(self, connection: Connection) -> None:
        self._per_user[connection.uid] -= 1
        if not self._per_user[connection.uid]:
            del self._per_user[connection.uid]
