"""Carry each connection's bytes between the peer and gRPC, so that a call tells whose it is.

grpcio can neither adopt an accepted socket nor tell a peer's credentials. So gRPC listens at a path
that only this process can reach, and each connection is carried there over a socket bound to a
fresh abstract name: `context.peer()` of a call is that name, and a table leads from it to the
number that the broker gave the connection. The name means nothing and is no secret: every uid can
read it in /proc/net/unix, and nobody else can connect to where it counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import select
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final

from convertd_daemon.front import fair_queue, header_filter, streams
from convertd_daemon.linux import getrandom, scm_rights

log = logging.getLogger(__name__)

Filtered = Callable[[bytes], Iterable[header_filter.Piece]]
"""What may go on of the bytes that came: pieces. Raises header_filter.Refused if nothing may any
more."""

Passed = Callable[[bytes], Iterable[bytes]]
"""The same, of which each piece takes a turn."""

Turn = Callable[[], Awaitable[None]]
"""Waits until the next piece may be looked for, and go on."""

ASKED_BYTES: Final = 4 * 1024
"""What is taken at once of what a peer says: a few calls, and work for a millisecond at most."""

ANSWERED_BYTES: Final = 64 * 1024
"""The same of what gRPC answers."""


@dataclass(slots=True, kw_only=True, eq=False)
class Carried:
    """A connection that is being carried: the broker's number for it, whose it is, and its calls.

    `conversions` of these go on; `seen` are the calls that had ended when it last was looked at,
    and `since` when it was first seen that no more had, in seconds of the loop's clock.
    """

    number: int
    uid: int
    downstream: socket.socket
    streams: streams.Streams
    conversions: int = 0
    seen: int = -1
    since: float = 0.0

    def is_idle(self, now: float, limit_s: float) -> bool:
        """Whether it has replies that are not taken, or calls without a request, for so long."""
        if len(self.streams) <= self.streams.running:
            self.seen = -1
        elif self.seen != self.streams.ended:
            self.seen, self.since = self.streams.ended, now
        else:
            return now - self.since > limit_s
        return False


class Relay:
    """The connections that are being carried, by the name that gRPC knows them under."""

    def __init__(self, upstream_path: str, screened: Callable[[streams.Streams], Filtered]) -> None:
        """Carry to the gRPC server at this path, through a screen for each connection."""
        self.upstream_path = upstream_path
        self._screened = screened
        self._carried: dict[str, Carried] = {}
        self.turns = fair_queue.FairQueue()
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def connection_of(self, grpc_peer: str) -> int | None:
        """The broker's number for what gRPC calls a peer; None for one that is not ours."""
        carried = self._carried.get(grpc_peer)
        return None if carried is None else carried.number

    def carried(self, grpc_peer: str) -> Carried | None:
        """The connection that gRPC calls so; None for one that is not ours."""
        return self._carried.get(grpc_peer)

    def open_calls(self, uid: int) -> int:
        """How many calls a user has on all connections, but for conversions that go on."""
        return sum(
            len(carried.streams) - carried.conversions
            for carried in self._carried.values()
            if carried.uid == uid
        )

    def end_idle(self, now: float, limit_s: float) -> None:
        """End connections, with all their calls, that have taken nothing for so long."""
        for carried in self._carried.values():
            if carried.is_idle(now, limit_s):
                log.info("ended a connection that takes no replies uid=%d", carried.uid)
                with contextlib.suppress(OSError):
                    carried.downstream.shutdown(socket.SHUT_RDWR)

    def carry(
        self, number: int, descriptor: int, uid: int, on_released: Callable[[], None]
    ) -> None:
        """Carry a user's connection until either side ends it. Owns the descriptor from now on.

        When that is closed `on_released` is called: before, the broker does not close the last one.
        """
        carrying = self._carry(number, descriptor, uid)
        task = asyncio.get_running_loop().create_task(carrying)
        task.add_done_callback(lambda _: on_released())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self, seconds: float) -> None:
        """Let connections that are ending end, for so long."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    async def _carry(self, number: int, descriptor: int, uid: int) -> None:
        downstream = socket.socket(fileno=descriptor)
        try:
            downstream.setblocking(False)
            await self._carry_upstream(number, downstream, uid)
        except OSError as error:
            log.debug("connection %d ended error=%s", number, error)
        finally:
            _end(downstream)

    async def _carry_upstream(self, number: int, downstream: socket.socket, uid: int) -> None:
        """Carry until either side ends it.

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
            self._carried[peer] = Carried(
                number=number, uid=uid, downstream=downstream, streams=calls
            )
            # First forget the name, then close: nobody may find it under somebody else's number.
            stack.callback(self._carried.pop, peer, None)
            await _connect(upstream, self.upstream_path, downstream)

            def passed(data: bytes) -> Iterable[bytes]:
                for piece in filtered(data):
                    self.turns.add(piece.begins_call)
                    yield piece.data

            filtered, turn = self._screened(calls), functools.partial(self.turns.take, uid)
            await join(downstream, upstream, passed, turn, calls.answered)


async def _connect(sock: socket.socket, path: str, caller: socket.socket) -> None:
    """Connect; a full backlog, which AF_UNIX answers with EAGAIN, has room a little later.

    Whoever comes and goes takes no place in it. The broker counts a connection only until its peer
    is gone: with those that are, one user filled the table of descriptors (measured 2026-11).

    Raises:
        OSError: there is nobody to connect for any more, or nobody to connect to.
    """
    pause_s = 0.001
    while True:
        if _is_over(caller):
            raise ConnectionAbortedError(errno.ECONNABORTED, "the peer is gone")
        try:
            sock.connect(path)
        except BlockingIOError:
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.1)
        else:
            return


def whole(data: bytes) -> Iterable[bytes]:
    """All of it passes."""
    return (data,)


async def at_once() -> None:
    """Nobody has to wait for a turn."""


async def join(
    downstream: socket.socket,
    upstream: socket.socket,
    passed: Passed = whole,
    turn: Turn = at_once,
    answered: Callable[[bytes], object] = len,
) -> None:
    """Carry both ways until one side ends; then the connection is over, both ways.

    What is asked, downstream, goes through `passed`, which makes each piece in a `turn`: to look
    through what comes is work too. What is answered is shown to `answered`.
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
    """Carry up. Who does not read its answers is not heard: else they would pile up in gRPC."""
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
        log.debug("connection ended: it brought descriptors")


async def _received(source: socket.socket) -> bytes:
    """Wait for something that was asked, and read it: never a descriptor that a peer attached.

    To close one takes as long as the peer likes, and would hold everybody up.

    Raises:
        scm_rights.Attached: there is one. It stays where it is.
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
    """Carry down. What one side sends before the other listens waits in the kernel.

    No buffer is kept while there is nothing to carry: for 1,000 connections that would be 64 MiB.
    """
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, ANSWERED_BYTES):
        answered(data)
        async with answering:
            await loop.sock_sendall(sink, data)


def _is_over(sock: socket.socket) -> bool:
    """Whether the peer has ended a connection, or its own half, which the broker takes for both."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def _end(sock: socket.socket) -> None:
    """End a connection of which the broker holds a copy: close() alone would leave it open.

    That copy is also why nobody waits here for what is attached to unread bytes.
    """
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
