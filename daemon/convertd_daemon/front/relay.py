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
import logging
import secrets
import select
import socket
from collections.abc import Callable
from typing import Final

from convertd_daemon.front import screen

log = logging.getLogger(__name__)

Passed = Callable[[bytes], bytes]
"""What may go on of the bytes that came. Raises screen.Refused if nothing may any more."""

BUFFER_BYTES: Final = 64 * 1024
"""What may wait in each direction before the other side is not read any more."""


class Relay:
    """The connections that are being carried, by the name that gRPC knows them under."""

    def __init__(self, upstream_path: str, screened: Callable[[], Passed]) -> None:
        """Carry to the gRPC server at this path, through a screen for each connection."""
        self.upstream_path = upstream_path
        self._screened = screened
        self._numbers: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def connection_of(self, grpc_peer: str) -> int | None:
        """The broker's number for what gRPC calls a peer; None for one that is not ours."""
        return self._numbers.get(grpc_peer)

    def carry(self, number: int, descriptor: int) -> None:
        """Carry a connection until either side ends it. Owns the descriptor from now on."""
        task = asyncio.get_running_loop().create_task(self._carry(number, descriptor))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self, seconds: float) -> None:
        """Let connections that are ending end, for so long."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    async def _carry(self, number: int, descriptor: int) -> None:
        downstream = socket.socket(fileno=descriptor)
        try:
            downstream.setblocking(False)
            await self._carry_upstream(number, downstream)
        except OSError as error:
            log.debug("connection %d ended error=%s", number, error)
        finally:
            _end(downstream)

    async def _carry_upstream(self, number: int, downstream: socket.socket) -> None:
        """Carry until either side ends it.

        Raises:
            OSError: a side ended it, or there are no descriptors.
        """
        name = f"convertd-{secrets.token_hex(16)}"
        peer = f"unix-abstract:{name}"
        with contextlib.ExitStack() as stack:
            upstream = stack.enter_context(
                socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            )
            upstream.bind(f"\0{name}")
            self._numbers[peer] = number
            # First forget the name, then close: nobody may find it under somebody else's number.
            stack.callback(self._numbers.pop, peer, None)
            await _connect(upstream, self.upstream_path, downstream)
            await join(asyncio.get_running_loop(), downstream, upstream, self._screened())


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


async def join(
    loop: asyncio.AbstractEventLoop,
    one: socket.socket,
    other: socket.socket,
    passed: Passed = bytes,
) -> None:
    """Carry both ways until one side ends; then the connection is over, both ways.

    What the `one` says goes through `passed`.
    """
    ways = {
        loop.create_task(_pump(loop, one, other, passed)),
        loop.create_task(_pump(loop, other, one, bytes)),
    }
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def _pump(
    loop: asyncio.AbstractEventLoop, source: socket.socket, sink: socket.socket, passed: Passed
) -> None:
    """Carry one way. What one side sends before the other listens waits in the kernel.

    No buffer is kept while there is nothing to carry: for 1,000 connections that would be 128 MiB.
    """
    try:
        while data := await loop.sock_recv(source, BUFFER_BYTES):
            await loop.sock_sendall(sink, passed(data))
    except screen.Refused as error:
        log.debug("connection ended: %s", error)


def _is_over(sock: socket.socket) -> bool:
    """Whether the peer has ended a connection, or its own half, which the broker takes for both."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def _end(sock: socket.socket) -> None:
    """End a connection of which the broker holds a copy: close() alone would leave it open."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
