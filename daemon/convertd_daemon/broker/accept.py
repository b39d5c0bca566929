"""Who is connected: the kernel's word for it, and a bound on how many.

The broker keeps its own descriptor of each connection while the front has another: that is how it
learns that the peer is gone, whatever the front says.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convertd_daemon import model
from convertd_daemon.broker import audit, caller
from convertd_daemon.kernel import peercred

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """One accepted connection, and who called connect(2) for it."""

    number: int
    sock: socket.socket
    peer: model.Peer
    caller: audit.Caller


class Connections:
    """All connections by number. Numbers are never used twice."""

    def __init__(self, limits: model.Limits) -> None:
        """Begin with none."""
        self.limits = limits
        self.prober = 0
        """The pid that is let in however many there are: our own, if we probe ourselves."""
        self._by_number: dict[int, Connection] = {}
        self._per_user: Counter[int] = Counter()
        self._numbers = itertools.count(1)

    def __iter__(self) -> Iterator[Connection]:
        return iter(tuple(self._by_number.values()))

    def __len__(self) -> int:
        return len(self._by_number)

    def find(self, number: int) -> Connection | None:
        """The connection of that number, if it lives and somebody may ask for something over it.

        Not over our own probe: it is root's by its credentials, and its other end is the front's.
        """
        found = self._by_number.get(number)
        return None if found is None or found.peer.pid == self.prober else found

    def admit(self, sock: socket.socket) -> Connection | None:
        """Ask the kernel who this is and keep it; None, and closed, if there are too many.

        Raises:
            OSError: the peer is gone already. The socket is closed.
        """
        try:
            told = peercred.peer_credentials(sock)
        except OSError:
            sock.close()
            raise
        total, own = len(self), self._per_user[told.uid]
        # Our own probe: a daemon with many callers is not a dead one.
        is_probe = told.pid == self.prober
        full = total >= self.limits.connections or own >= self.limits.connections_per_user
        if full and not is_probe:
            log.warning("too many connections uid=%d own=%d total=%d", told.uid, own, total)
            sock.close()
            return None
        peer = model.Peer(uid=told.uid, gid=told.gid, groups=frozenset(told.groups), pid=told.pid)
        comm, unit = caller.name_and_unit(told.pid, told.uid, told.gid)
        who = audit.Caller(uid=told.uid, gid=told.gid, pid=told.pid, comm=comm, unit=unit)
        connection = Connection(number=next(self._numbers), sock=sock, peer=peer, caller=who)
        self._by_number[connection.number] = connection
        self._per_user[peer.uid] += 1
        return connection

    def drop(self, connection: Connection) -> None:
        """Forget a connection and close our descriptor of it."""
        del self._by_number[connection.number]
        self._per_user[connection.peer.uid] -= 1
        if not self._per_user[connection.peer.uid]:
            del self._per_user[connection.peer.uid]
        connection.sock.close()
