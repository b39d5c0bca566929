"""Relay each connection's bytes between the peer and gRPC, so that a call is known by its peer.

grpcio can neither adopt an accepted socket nor report a peer's credentials. So gRPC listens at a
path that only this process can reach, and each connection is relayed there over a socket bound to a
fresh abstract name: `context.peer()` of a call is that name, and a table maps it to the broker's
number for the connection. The name is no secret: every uid can read it in /proc/net/unix, but no
other process can connect to gRPC's path.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final

from convertd_daemon.front import fair_queue, header_filter, streams
from convertd_daemon.linux import getrandom, peercred, scm_rights

log = logging.getLogger(__name__)

Filtered = Callable[[bytes], Iterable[header_filter.Piece]]
"""From received bytes to the pieces to forward. Raises header_filter.Refused to end it."""

Passed = Callable[[bytes], Iterable[bytes]]
"""The same, as bare bytes."""

Turn = Callable[[], Awaitable[None]]
"""Waits until the next piece may be checked and forwarded."""

ASKED_BYTES: Final = 4 * 1024
"""Read at once from a peer: a few calls, and work for a millisecond at most."""

ANSWERED_BYTES: Final = 64 * 1024
"""Read at once from gRPC."""


@dataclass(slots=True, kw_only=True, eq=False)
class RelayedConnection:
    """A relayed connection: the broker's number for it, its peer's uid, and its calls.

    Attributes:
        conversions: how many of its calls are running conversions.
        seen: calls that had ended at the last check, -1 if it was not idle then.
        since: when a check first found this number of them, in seconds of the loop's clock.
    """

    number: int
    uid: int
    downstream: socket.socket
    streams: streams.Streams
    conversions: int = 0
    seen: int = -1
    since: float = 0.0

    def is_idle(self, now: float, limit_s: float) -> bool:
        """Whether it has had unread replies or incomplete requests, and no ended call, so long."""
        if len(self.streams) <= self.streams.running:
            self.seen = -1
        elif self.seen != self.streams.ended:
            self.seen, self.since = self.streams.ended, now
        else:
            return now - self.since > limit_s
        return False


class Relay:
    """The relayed connections, by gRPC's name for their peer."""

    def __init__(
        self, upstream_path: str, make_filter: Callable[[streams.Streams], Filtered]
    ) -> None:
        """Relay to the gRPC server at this path, with a header filter for each connection."""
        self.upstream_path = upstream_path
        self._make_filter = make_filter
        self._connections: dict[str, RelayedConnection] = {}
        self.queue = fair_queue.FairQueue()
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def connection_of(self, grpc_peer: str) -> int | None:
        """The broker's number for a peer of gRPC's; None for one that is not ours."""
        connection = self._connections.get(grpc_peer)
        return None if connection is None else connection.number

    def find(self, grpc_peer: str) -> RelayedConnection | None:
        """The connection of a peer of gRPC's; None for one that is not ours."""
        return self._connections.get(grpc_peer)

    def open_calls(self, uid: int) -> int:
        """How many calls a user has on all connections, running conversions not counted."""
        return sum(
            len(connection.streams) - connection.conversions
            for connection in self._connections.values()
            if connection.uid == uid
        )

    def end_idle(self, now: float, limit_s: float) -> None:
        """Close connections that were idle for so long, which ends their calls."""
        for connection in self._connections.values():
            if connection.is_idle(now, limit_s):
                log.info("closed a connection that reads no replies uid=%d", connection.uid)
                with contextlib.suppress(OSError):
                    connection.downstream.shutdown(socket.SHUT_RDWR)

    def relay(
        self, number: int, descriptor: int, uid: int, on_released: Callable[[], None]
    ) -> None:
        """Relay a user's connection until either side ends it. Owns the descriptor from now on.

        `on_released` is called when it is closed: until then the broker keeps its own copy open.
        """
        relaying = self._relay(number, descriptor, uid)
        task = asyncio.get_running_loop().create_task(relaying)
        task.add_done_callback(lambda _: on_released())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self, seconds: float) -> None:
        """Wait for connections that are ending, for so long."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    async def _relay(self, number: int, descriptor: int, uid: int) -> None:
        downstream = socket.socket(fileno=descriptor)
        try:
            downstream.setblocking(False)
            await self._relay_upstream(number, downstream, uid)
        except OSError as error:
            log.debug("connection %d ended error=%s", number, error)
        finally:
            _end(downstream)

    async def _relay_upstream(self, number: int, downstream: socket.socket, uid: int) -> None:
        """Relay until either side ends it.

        Raises:
            OSError: a side ended it, or there are no descriptors.
        """
        name = f"convertd-{getrandom.hex_name(16)}"
        peer = f"unix-abstract:{name}"
        with contextlib.ExitStack() as stack:
            upstream = stack.enter_context(
                socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            )
            upstream.bind(f"\0{name}")
            calls = streams.Streams()
            self._connections[peer] = RelayedConnection(
                number=number, uid=uid, downstream=downstream, streams=calls
            )
            # Forget the name before close() frees it: a later socket of that name is another's.
            stack.callback(self._connections.pop, peer, None)
            await _connect(upstream, self.upstream_path, downstream)

            def passed(data: bytes) -> Iterable[bytes]:
                for piece in filtered(data):
                    self.queue.add(piece.begins_call)
                    yield piece.data

            filtered, turn = self._make_filter(calls), functools.partial(self.queue.take, uid)
            await join(downstream, upstream, passed, turn, calls.answered)


async def _connect(sock: socket.socket, path: str, caller: socket.socket) -> None:
    """Connect; retry while the backlog is full, which AF_UNIX answers with EAGAIN.

    Ends when the caller disconnects. The broker counts a connection only until its peer is gone:
    with those that were, one user filled the table of descriptors (measured 2026-11).

    Raises:
        OSError: the caller is gone, or nothing listens.
    """
    pause_s = 0.001
    while True:
        if peercred.has_hung_up(caller):
            raise ConnectionAbortedError(errno.ECONNABORTED, "the peer is gone")
        try:
            sock.connect(path)
        except BlockingIOError:
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.1)
        else:
            return


def whole(data: bytes) -> Iterable[bytes]:
    """Forward everything."""
    return (data,)


async def at_once() -> None:
    """Wait for no turn."""


async def join(
    downstream: socket.socket,
    upstream: socket.socket,
    passed: Passed = whole,
    turn: Turn = at_once,
    answered: Callable[[bytes], object] = len,
) -> None:
    """Relay both ways until one side ends; then the connection is over, both ways.

    Bytes from downstream go through `passed`, which makes each piece in a `turn`: the check is work
    too. Bytes from upstream are shown to `answered`.
    """
    loop, answering = asyncio.get_running_loop(), asyncio.Lock()
    ways = {
        loop.create_task(_ask(downstream, upstream, answering, passed, turn)),
        loop.create_task(_answer(upstream, downstream, answering, answered)),
    }
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def _ask(
    source: socket.socket, sink: socket.socket, answering: asyncio.Lock, passed: Passed, turn: Turn
) -> None:
    """Relay upstream, while the peer reads its replies: else they would pile up in gRPC."""
    loop = asyncio.get_running_loop()
    try:
        while data := await _received(source):
            pieces = iter(passed(data))
            while True:
                async with answering:
                    pass
                await turn()
                piece = next(pieces, None)
                if piece is None:
                    break
                await loop.sock_sendall(sink, piece)
    except header_filter.Refused as error:
        log.debug("connection ended: %s", error)
    except scm_rights.Attached:
        log.debug("connection ended: the peer attached descriptors")


async def _received(source: socket.socket) -> bytes:
    """Wait for bytes from a peer, and read them; never a descriptor that the peer attached.

    To close one takes as long as the peer likes, and would block this process.

    Raises:
        scm_rights.Attached: there is one. It stays in the socket.
        OSError: the connection is over.
    """
    while True:
        try:
            return scm_rights.read(source, ASKED_BYTES)
        except BlockingIOError:
            await _readable(source)


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)


async def _answer(
    source: socket.socket,
    sink: socket.socket,
    answering: asyncio.Lock,
    answered: Callable[[bytes], object],
) -> None:
    """Relay downstream.

    No buffer is kept while there is nothing to relay: for 1,000 connections that would be 64 MiB.
    """
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, ANSWERED_BYTES):
        answered(data)
        async with answering:
            await loop.sock_sendall(sink, data)


def _end(sock: socket.socket) -> None:
    """End a connection of which the broker holds a copy: close() alone would leave it open.

    Thanks to that copy, this close() need not close descriptors attached to unread bytes.
    """
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
