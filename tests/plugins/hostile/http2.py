"""HTTP/2, byte by byte: what a library would never send. Source: RFC 9113, RFC 7541."""

from __future__ import annotations

import contextlib
import enum
import itertools
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from harness.callers import SERVICE, Caller

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Kind(enum.IntEnum):
    """Types of frames."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


FRAME_HEADER_BYTES: Final = 9

ACK: Final = 1
END_STREAM: Final = 1
END_HEADERS: Final = 4

HEADERS: Final = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", f"/{SERVICE}/GetAccess".encode()),
    (b":authority", b"localhost"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
)


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    """One frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def block(headers: tuple[tuple[bytes, bytes], ...] = HEADERS) -> bytes:
    """Headers as HPACK has them, in its plainest form."""
    return b"".join(b"\0" + _string(name) + _string(value) for name, value in headers)


def _string(text: bytes) -> bytes:
    return _integer(len(text), 7) + text


def _integer(value: int, bits: int) -> bytes:
    most = (1 << bits) - 1
    if value < most:
        return bytes([value])
    digits = [most]
    value -= most
    while value >= 128:
        digits.append(value % 128 | 128)
        value //= 128
    return bytes([*digits, value])


def message(data: bytes, length: int | None = None) -> bytes:
    """A gRPC message; `length` may lie. Source: gRPC over HTTP2."""
    return struct.pack(">BI", 0, len(data) if length is None else length) + data


def opening(*frames: bytes) -> bytes:
    """How a connection begins, and what comes then."""
    return b"".join((PREFACE, frame(Kind.SETTINGS), *frames))


def call(stream: int = 1, data: bytes = b"", path: str = "GetAccess") -> bytes:
    """A whole call."""
    headers = tuple(
        (name, f"/{SERVICE}/{path}".encode() if name == b":path" else value)
        for name, value in HEADERS
    )
    return frame(Kind.HEADERS, block(headers), flags=END_HEADERS, stream=stream) + frame(
        Kind.DATA, message(data), flags=END_STREAM, stream=stream
    )


@contextlib.contextmanager
def connected(path: Path, caller: Caller) -> Iterator[socket.socket]:
    """A connection of a user's, in this process: the kernel remembers who called connect(2)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        os.setegid(caller.gid)
        os.seteuid(caller.uid)
        try:
            sock.connect(str(path))
        finally:
            os.seteuid(0)
            os.setegid(0)
        yield sock


def sent(sock: socket.socket, data: bytes) -> bool:
    """Send as much as the other side takes; False if it has ended the connection by then."""
    try:
        sock.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        return False
    except TimeoutError:
        return True  # it lets us wait
    return True


def answer(sock: socket.socket, patience_s: float) -> bytes:
    """What comes until the other side ends the connection, or says nothing for so long."""
    sock.settimeout(patience_s)
    said = b""
    with contextlib.suppress(TimeoutError, ConnectionResetError):
        while data := sock.recv(65536):
            said += data
    return said


def frames(sock: socket.socket) -> Iterator[tuple[int, int, int]]:
    """Kind, flags and stream of each frame that comes, until the other side ends the connection."""
    said = b""
    while data := sock.recv(65536):
        said += data
        while len(said) >= FRAME_HEADER_BYTES + (length := int.from_bytes(said[:3])):
            yield struct.unpack(">BBI", said[3:FRAME_HEADER_BYTES])
            said = said[FRAME_HEADER_BYTES + length :]


def await_pong(sock: socket.socket) -> None:
    """Wait until a PING is answered, and with it all before it was seen."""
    assert any(kind == Kind.PING and flags & ACK for kind, flags, _ in frames(sock))


def ended(sock: socket.socket, count: int) -> set[int]:
    """Wait until the other side has ended so many calls, and tell which."""
    ends = (
        stream
        for kind, flags, stream in frames(sock)
        if kind == Kind.HEADERS and flags & END_STREAM
    )
    return set(itertools.islice(ends, count))
