"""A health check from outside: a gRPC client on a connection of the broker to its public socket.

grpcio can't adopt a connected socket. So the client connects to a socket in the private directory,
and the connection accepted there is joined to the broker's, which leads through the public socket
back to the server in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from typing import TYPE_CHECKING, Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from convertd_daemon.front import relay

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

LIMIT_S: Final = 30.0
"""The server may be busy: a slow check counts like a quick one."""

CHECK: Final = "/grpc.health.v1.Health/Check"

OPTIONS: Final = (
    # Each probe is a connection of its own, and so a channel of its own.
    ("grpc.use_local_subchannel_pool", 1),
)


class Prober:
    """Checks the health of a service over given connections."""

    def __init__(self, path: str, service: str) -> None:
        """Listen at `path` for our own client."""
        self.path = path
        self.service = service
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # of an earlier front
        self._listening.bind(path)
        self._listening.listen()
        self._checks: set[asyncio.Task[None]] = set()

    def probe(self, descriptor: int, on_health: Callable[[], None]) -> None:
        """Check over a connection, and own it from now on."""
        work = self._check(descriptor, on_health)
        check = asyncio.get_running_loop().create_task(work)
        self._checks.add(check)
        check.add_done_callback(self._checks.discard)

    async def _check(self, descriptor: int, on_health: Callable[[], None]) -> None:
        with contextlib.closing(socket.socket(fileno=descriptor)) as outside:
            outside.setblocking(False)
            try:
                async with asyncio.timeout(LIMIT_S):
                    await self._ask(outside)
            except grpc.aio.AioRpcError as error:
                log.warning("health check failed status=%s", error.code().name)
            except OSError as error:
                why = "no answer in time" if isinstance(error, TimeoutError) else error
                log.warning("health check failed error=%s", why)
            else:
                on_health()

    async def _ask(self, outside: socket.socket) -> None:
        joining = asyncio.get_running_loop().create_task(self._join(outside))
        try:
            async with grpc.aio.insecure_channel(f"unix:{self.path}", options=OPTIONS) as client:
                reply = await client.unary_unary(
                    CHECK,
                    request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                    response_deserializer=health_pb2.HealthCheckResponse.FromString,
                )(health_pb2.HealthCheckRequest(service=self.service))
        finally:
            joining.cancel()
            await asyncio.gather(joining, return_exceptions=True)
        if reply.status != health_pb2.HealthCheckResponse.SERVING:
            raise OSError(f"status {reply.status}")

    async def _join(self, outside: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        inside, _ = await loop.sock_accept(self._listening)
        with contextlib.closing(inside):
            await relay.join(inside, outside)
