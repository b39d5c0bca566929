"""The gRPC server: its limits, and the services on it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from convertd_daemon.front import call_limits, health, service

if TYPE_CHECKING:
    from collections.abc import Callable

    from convertd_daemon.front.broker_link import BrokerLink
    from convertd_daemon.front.relay import Relay

OPTIONS: Final = (
    # A request is two paths and a few words.
    ("grpc.max_receive_message_length", 256 * 1024),
    ("grpc.max_send_message_length", 4 * 1024 * 1024),
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.absolute_max_metadata_size", 16 * 1024),
    # maximum_concurrent_rpcs is not set: one client could lock out all others. So could the
    # defaults of these: with 1,000 calls pending, or one for 30 s, gRPC cancels calls of any peer.
    ("grpc.server.max_pending_requests", 2**31 - 1),
    ("grpc.server.max_pending_requests_hard_limit", 2**31 - 1),
    ("grpc.server_max_unrequested_time_in_server", 3600),
    ("grpc.max_concurrent_streams", 32),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 15 * 60 * 1000),
    ("grpc.keepalive_time_ms", 30_000),
    # keepalive_timeout_ms is ignored; this one decides.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.so_reuseport", 0),
    # Binary metadata comes in base64: header_filter.py lets nothing else pass.
    ("grpc.http2.true_binary", 0),
)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log record of gRPC's is more than a peer that disconnected during a call.

    gRPC logs that with a traceback, as often as a peer likes.
    """
    return "ExecuteBatchError raised in core" not in str(record.msg)


class CallCounter(grpc.GenericRpcHandler):
    """Counts the calls that gRPC accepts: the first of its handlers, and it handles none."""

    def __init__(self, on_call_accepted: Callable[[], None]) -> None:
        """Report each accepted call to `on_call_accepted`."""
        self._on_call_accepted = on_call_accepted

    def service(self, _details: grpc.HandlerCallDetails) -> None:
        """Count a call, and leave it to the next handler."""
        self._on_call_accepted()


async def start(
    path: str, broker: BrokerLink, relay: Relay, calls: call_limits.Calls
) -> grpc.aio.Server:
    """Start the server, listening at the internal path."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)
    server = grpc.aio.server(options=OPTIONS, interceptors=(calls,))
    handlers = service.ConvertService(broker, relay).handler()
    server.add_generic_rpc_handlers((CallCounter(relay.queue.on_call_accepted), handlers))
    health_pb2_grpc.add_HealthServicer_to_server(health.Health("", service.SERVICE), server)
    watched = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    reflection.enable_server_reflection((service.SERVICE, watched, reflection.SERVICE_NAME), server)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    return server
