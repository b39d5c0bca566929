"""Limits on one user's open calls and unread replies, which gRPC keeps in memory.

A peer can read its socket and still have gRPC send no reply, with an HTTP/2 window of 0. gRPC keeps
each reply until it may be sent: one user filled 1.7 GB in 77 s, and others waited for 24 s (grpcio
1.85, measured 2026-11). All connections of a user count together.

gRPC also buffers incomplete requests: 340 MiB for 124 connections of one user (2026-11). So a call
is counted, and refused, when it begins. Only a handler of a stream of requests is called before the
first request is complete, so every handler is made into one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Final, Self

import grpc
import grpc.aio

from convertd_core import conditions
from convertd_daemon.front import error_status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from convertd_daemon.front.relay import Relay, RelayedConnection

    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

log = logging.getLogger(__name__)

IN_FLIGHT: Final = 128
"""Open calls of one user: running, or with a reply that was not read. One more is refused by a
status alone, for which HTTP/2 needs no window. A running conversion does not count: the limits of
the job queue apply to it."""

TAKEN_WITHIN_S: Final = 20.0
"""A connection with unread replies or incomplete requests is closed if none of its calls has ended
for so long."""

CHECK_INTERVAL_S: Final = 1.0

CONVERT: Final = "/convertd.v1.ConvertService/Convert"


class Calls(grpc.aio.ServerInterceptor):
    """Wraps every handler of the server, health and reflection included."""

    def __init__(self, relay: Relay) -> None:
        """Count the calls on this relay's connections, per user."""
        self._relay = relay

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the method's handler, wrapped in the count."""
        handler = await continuation(handler_call_details)
        return None if handler is None else self._counted(handler, handler_call_details.method)

    def _counted(self, handler: Handler, method: str) -> Handler:
        make: Any
        behavior: Any
        if handler.unary_unary is not None:
            make, behavior = grpc.stream_unary_rpc_method_handler, self._unary(handler.unary_unary)
        elif handler.unary_stream is not None:
            make = grpc.stream_stream_rpc_method_handler
            behavior = self._stream(handler.unary_stream, converts=method == CONVERT)
        else:
            make = grpc.stream_stream_rpc_method_handler
            behavior = self._streams(handler.stream_stream)
        counted: Handler = make(
            behavior,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return counted

    def _unary(self, answer: Any) -> Any:  # noqa: ANN401 - grpc's own types
        async def counted(_requests: object, context: Context) -> Any:  # noqa: ANN401
            connection = await self._admit(context)
            asked = [await _only_request(context)]
            with Running(connection):
                return await answer(asked.pop(), context)

        return counted

    def _stream(self, answer: Any, *, converts: bool) -> Any:  # noqa: ANN401
        async def counted(_requests: object, context: Context) -> AsyncIterator[Any]:
            connection = await self._admit(context)
            # A list, so that the handler holds the only reference: it may drop the request early.
            asked = [await _only_request(context)]
            with Running(connection, converts=converts) as running:
                async for reply in answer(asked.pop(), context):
                    # Newer progress replaces unread progress: a conversion does not wait for it.
                    if not converts or reply.HasField("result"):
                        with running.paused():
                            yield reply
                    else:
                        yield reply

        return counted

    def _streams(self, answer: Any) -> Any:  # noqa: ANN401
        async def counted(requests: object, context: Context) -> AsyncIterator[Any]:
            with Running(await self._admit(context)) as running:
                async for reply in answer(requests, context):
                    with running.paused():
                        yield reply

        return counted

    async def _admit(self, context: Context) -> RelayedConnection | None:
        """Admit a call, and return its connection.

        Raises:
            grpc.aio.AbortError: its user has too many calls.
        """
        connection = self._relay.find(context.peer())
        if connection is not None and self._relay.open_calls(connection.uid) > IN_FLIGHT:
            await error_status.abort(context, conditions.TooManyCalls(limit=IN_FLIGHT).failure())
        return connection

    async def watch(self) -> None:
        """Close idle connections, until cancelled."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            self._relay.end_idle(asyncio.get_running_loop().time(), TAKEN_WITHIN_S)


class Running:
    """Marks a call as being handled, on its connection of the relay if it has one."""

    def __init__(self, connection: RelayedConnection | None, *, converts: bool = False) -> None:
        self._connection = connection
        self._converts = converts

    def __enter__(self) -> Self:
        self._add(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._add(-1)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The call is not being handled while its reply waits to be read."""
        self._add(-1)
        try:
            yield
        finally:
            self._add(1)

    def _add(self, count: int) -> None:
        if self._connection is not None:
            self._connection.streams.running += count
            self._connection.conversions += count * self._converts


async def _only_request(context: Context) -> Any:  # noqa: ANN401
    """Wait for the one request of a call.

    Raises:
        grpc.aio.AbortError: the peer sent none.
    """
    request = await context.read()
    if request is grpc.aio.EOF:
        await error_status.abort(
            context, conditions.BadMessage(problem="the call has none").failure()
        )
    return request
