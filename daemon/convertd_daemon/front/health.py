"""grpc.health.v1: we serve, as long as there is somebody who says so.

Not grpcio's own: there, all who watch a service share a lock, and hold it while their first reply
is on its way. Whoever did not take his kept everybody else waiting (1.85, measured 2026-11).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    Context = grpc.aio.ServicerContext[Any, Any]

SERVING: Final = health_pb2.HealthCheckResponse.SERVING
UNKNOWN: Final = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):
    """Answers for these services, which are there from the beginning to the end."""

    def __init__(self, *services: str) -> None:
        """Of these names; the empty one is the whole server."""
        self._services = frozenset(services)

    async def Check(  # noqa: N802 - the contract's name
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Say that a service serves."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return health_pb2.HealthCheckResponse(status=SERVING)

    async def Watch(  # noqa: N802 - the contract's name
        self, request: health_pb2.HealthCheckRequest, _context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Say the same once; nothing changes before the call ends."""
        status = SERVING if request.service in self._services else UNKNOWN
        del request  # it may be long, and this call may be
        yield health_pb2.HealthCheckResponse(status=status)
        await asyncio.get_running_loop().create_future()
