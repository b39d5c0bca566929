"""Makes gRPC calls for a test, as the user who runs this. The source is handed over by `python -c`.

Orders come on standard input, one JSON object a line: {"id", "method", "data", "timeout"} makes a
call, {"id"} alone calls it off. What comes back is told the same way: {"id", "message"} for each
message, then {"id", "code", "text", "details"}. Messages and details are base64. Nothing is parsed
here, so that any bytes can be sent.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import sys
from typing import Any

import grpc
import grpc.aio

OPTIONS = (
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.max_metadata_size", 64 * 1024),
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
)

calls: dict[int, Any] = {}


def report(number: int, **event: object) -> None:
    """Write one line."""
    sys.stdout.write(json.dumps({"id": number, **event}) + "\n")
    sys.stdout.flush()


def as_text(data: bytes) -> str:
    """Bytes for JSON."""
    return base64.b64encode(data).decode()


def as_bytes(data: bytes) -> bytes:
    """Messages go as they are."""
    return data


def begin(channel: grpc.aio.Channel, command: dict[str, Any]) -> None:
    """Make one call. The next command may call it off."""
    method = channel.unary_stream(command["method"], as_bytes, as_bytes)
    data = base64.b64decode(command["data"])
    calls[command["id"]] = method(data, timeout=command["timeout"], wait_for_ready=True)


async def receive(number: int) -> None:
    """Tell all that is heard of a call."""
    call = calls[number]
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        async for message in call:
            report(number, message=as_text(message))
    trailing = await call.trailing_metadata() or ()
    details = [as_text(value) for key, value in trailing if isinstance(value, bytes)]
    code, text = await call.code(), await call.details()
    report(number, code=code.name, text=text or "", details=details)
    del calls[number]


async def main(socket: str) -> None:
    """Make and cancel calls until standard input ends."""
    commands = asyncio.StreamReader(limit=2**24)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(commands), sys.stdin
    )
    tasks = set()
    async with grpc.aio.insecure_channel(f"unix:{socket}", OPTIONS) as channel:
        async for line in commands:
            command = json.loads(line)
            if "method" in command:
                begin(channel, command)
                tasks.add(asyncio.create_task(receive(command["id"])))
            elif command["id"] in calls:
                calls[command["id"]].cancel()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
