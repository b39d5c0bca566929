"""The open calls (HTTP/2 streams) of a connection, as told by its frames in both directions.

A call is open until its reply has been sent. gRPC's server does not report that: it takes a unary
reply for sent that HTTP/2's flow control holds back (grpcio 1.85, measured 2026-11). The frames
show it. Source: RFC 9113, sections 5.1 and 6.
"""

from __future__ import annotations

from typing import Final

FRAME_HEADER_BYTES: Final = 9

DATA: Final = 0
HEADERS: Final = 1
RST_STREAM: Final = 3
END_STREAM: Final = 0x01


class Streams:
    """The calls that one connection has open.

    Attributes:
        running: how many of them are being handled. The others wait for the peer, which has not
            sent its request or not read its reply.
        ended: how many have ended.
    """

    def __init__(self) -> None:
        self.running = 0
        self.ended = 0
        self._open: set[int] = set()
        self._header = bytearray()
        self._unseen = 0

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, stream: int) -> None:
        """Record a call, of which the peer has sent all headers."""
        self._open.add(stream)

    def end(self, stream: int) -> None:
        """Record that either side has ended a call; a second time changes nothing."""
        if stream in self._open:
            self._open.remove(stream)
            self.ended += 1

    def answered(self, data: bytes) -> None:
        """Find the ends of calls in gRPC's bytes, as they arrive."""
        at = min(self._unseen, len(data))
        self._unseen -= at
        while at < len(data):
            missing = FRAME_HEADER_BYTES - len(self._header)
            self._header += data[at : at + missing]
            at += missing
            if len(self._header) < FRAME_HEADER_BYTES:
                return
            self._frame(bytes(self._header))
            length = int.from_bytes(self._header[:3])
            self._header.clear()
            self._unseen = max(length - max(len(data) - at, 0), 0)
            at += length

    def _frame(self, header: bytes) -> None:
        kind, flags, stream = header[3], header[4], int.from_bytes(header[5:9]) & 0x7FFFFFFF
        if kind == RST_STREAM or (kind in {DATA, HEADERS} and flags & END_STREAM):
            self.end(stream)
