"""Start and end of the front process.

The broker executes it, as a user of its own and with one descriptor: its channel. It imports all
that it will ever need, sandboxes itself, and only then makes a gRPC server, whose threads inherit
the sandbox: Landlock, no_new_privs and seccomp bind a thread and those it starts, none that runs
already.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread
import encodings.idna
import importlib
import linecache
import logging
import socket
import sys
import uuid
import zoneinfo
from typing import Final

from convertd_core import messages
from convertd_daemon import channel
from convertd_daemon.front import (
    broker_link,
    call_limits,
    header_filter,
    health_probe,
    relay,
    server,
    service,
)
from convertd_daemon.linux import prctl
from convertd_daemon.sandbox import confine, seccomp

log = logging.getLogger(__name__)

CHANNEL_DESCRIPTOR: Final = 3

LATE: Final = (
    concurrent.futures.thread,
    encodings.idna,
    uuid,
    zoneinfo,
    importlib.import_module("_strptime"),
)
"""Modules that others import late: in the sandbox no file can be opened."""

GRACE_S: Final = 1.0
"""For replies in flight when the broker is gone or stops."""


def main() -> int:
    """Serve until the broker's end of the channel closes."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(levelname)s %(name)s[%(process)d] %(message)s",
        stream=sys.stderr,
    )
    private = sys.argv[1]
    broker_channel = channel.Channel(socket.socket(fileno=CHANNEL_DESCRIPTOR))
    prctl.set_name("convertd-front")
    _remember_sources()
    confine.confine_front(private, seccomp.compile_profile(seccomp.FRONT))
    asyncio.run(_serve(broker_channel, private))
    return 0


def _remember_sources() -> None:
    """Cache the source of our modules for tracebacks: in the sandbox no file can be read."""
    for name, module in tuple(sys.modules.items()):
        if name.startswith("convertd"):
            linecache.getlines(getattr(module, "__file__", None) or "")


async def _serve(broker_channel: channel.Channel, private: str) -> None:
    path = f"{private}/grpc.sock"
    a_relay = relay.Relay(path, lambda calls: header_filter.HeaderFilter(calls).pieces)
    prober = health_probe.Prober(f"{private}/probe.sock", service.SERVICE)
    broker = broker_link.BrokerLink(broker_channel, a_relay, prober)
    calls = call_limits.Calls(a_relay)
    serving = await server.start(path, broker, a_relay, calls)
    watching = asyncio.get_running_loop().create_task(calls.watch())
    broker.send(messages.Ready())
    await broker.ended.wait()
    watching.cancel()
    await serving.stop(GRACE_S)
    await a_relay.drain(GRACE_S)
