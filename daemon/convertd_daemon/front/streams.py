"""Which calls of a connection go on, as its bytes tell: begun by the peer, ended by gRPC or by it.

A call that was answered goes on for as long as its reply has not gone out. gRPC's server does not
tell that: it calls a unary reply sent that HTTP/2's flow control holds back (grpcio 1.85, measured
2026-11). Its frames do. Source: RFC 9113, sections 5.1 and 6.
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
        running: how many of them somebody is still making a reply to. The others have none yet to
            make, for their request did not come, or one that was not taken.
        ended: how many have ended.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self.running = 0
        self.ended = 0
        self._open: set[int] = set()
        self._header = bytearray()
        self._unseen = 0

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, stream: int) -> None:
        """Take note of a call's headers, which came whole."""
        self._open.add(stream)

    def end(self, stream: int) -> None:
        """Take note that either side has ended a call, or says so once more."""
        if stream in self._open:
            self._open.remove(stream)
            self.ended += 1

    def answered(self, data: bytes) -> None:
        """Look through what gRPC says, in pieces as they come, for the ends of calls."""
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
