"""Check a peer's HTTP/2 header blocks before gRPC parses them: only ASCII passes. Fails closed.

grpcio's asyncio server decodes the path of a call as UTF-8 in the loop that accepts all calls. One
invalid path ended that loop, and with it the service for all users (grpcio 1.85, measured 2026-11).
So each header block is checked before it is forwarded, and a connection that sends other text than
ASCII is closed. Names and values from a table need no check: they are HTTP/2's own, or were
literals in an earlier block. The meaning of the frames is left to gRPC.

No client needs more: gRPC sends binary metadata in base64, unless the server offers to accept true
binary metadata. Source: RFC 9113 (frames), RFC 7541 (HPACK), gRPC over HTTP2.
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Final, NamedTuple

from convertd_daemon.front import streams

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFACE_BYTES: Final = 24
FRAME_HEADER_BYTES: Final = 9

HEADERS: Final = 1
CONTINUATION: Final = 9
END_HEADERS: Final = 0x04
HAS_PRIORITY: Final = 0x20
FLAGS: Final = {HEADERS: 0x01 | END_HEADERS | HAS_PRIORITY, CONTINUATION: END_HEADERS}
"""The flags that are allowed. Not PADDED, which implementations interpret differently."""
PRIORITY_BYTES: Final = 5
"""A frame too short for it is refused: gRPC then reads the block from another byte on than we do
(grpcio 1.85, measured 2026-11)."""

MAX_BLOCK_BYTES: Final = 32 * 1024
"""More than gRPC accepts. To check so many takes 16 ms, in one turn (2026-11)."""

MAX_INTEGER_BYTES: Final = 4
"""No length and no index in such a block needs more."""

NEW_SIZE: Final = 0x20
"""The first three bits of a field that sets a new size of the table."""

CODES: Final = {
    5: "012aceiost",
    6: " %-./3456789=A_bdfghlmnpru",
    7: ":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz",
    8: "&*,;XZ",
    10: '!"()?',
    11: "'+|",
    12: "#>",
    13: "\0$@[]~",
    14: "^}",
    15: "<`{",
    19: "\\",
}
"""The letters of HPACK's Huffman code by length of their code in bits. The code is canonical, so
their order gives the codes. All other codes are control characters or not ASCII."""

MAX_PADDING_BITS: Final = 7


class Refused(Exception):
    """The peer sent bytes that no gRPC client sends; the connection must be closed."""


class Piece(NamedTuple):
    """Bytes that may be forwarded, and whether a call begins with them."""

    data: bytes
    begins_call: bool


class HeaderFilter:
    """Checks the bytes of one peer as they arrive."""

    def __init__(self, calls: streams.Streams) -> None:
        """Expect the preface. Calls that the peer begins and ends are recorded in `calls`."""
        self._calls = calls
        self._rest = bytearray()
        self._unseen = PREFACE_BYTES
        self._held = bytearray()
        self._block = bytearray()

    def pieces(self, data: bytes) -> Iterator[Piece]:
        """Take received bytes, and yield those to forward: all but an unfinished header block.

        A piece has one header block at most, and is not checked before the one ahead of it was
        taken.

        Raises:
            Refused: nothing more of this connection may be forwarded.
        """
        self._rest += data
        ready, begins_call = bytearray(), False
        while True:
            count = min(self._unseen, len(self._rest))
            ready += self._taken(count)
            self._unseen -= count
            if self._unseen:
                break
            if ready and self._is_block_next():
                yield Piece(bytes(ready), begins_call)
                ready, begins_call = bytearray(), False
            before = len(ready)
            if not self._next_frame(ready):
                break
            begins_call |= len(ready) > before
        if ready:
            yield Piece(bytes(ready), begins_call)

    def _is_block_next(self) -> bool:
        return len(self._rest) >= FRAME_HEADER_BYTES and self._rest[3] == HEADERS

    def _next_frame(self, ready: bytearray) -> bool:
        """Handle one frame; False if more data is needed. Some payloads are skipped unseen."""
        if len(self._rest) < FRAME_HEADER_BYTES:
            return False
        whole = FRAME_HEADER_BYTES + int.from_bytes(self._rest[:3])
        kind, flags = self._rest[3:5]
        if bool(self._held) is not (kind == CONTINUATION):
            raise Refused("a header block without its continuation, or the reverse")
        stream = int.from_bytes(self._rest[5:9]) & 0x7FFFFFFF
        if kind == streams.RST_STREAM:
            self._calls.end(stream)
        if kind not in FLAGS:
            self._unseen = whole
            return True
        if flags & ~FLAGS[kind] or len(self._held) + whole > MAX_BLOCK_BYTES:
            raise Refused("a header block of an unusual kind or length")
        if flags & HAS_PRIORITY and whole < FRAME_HEADER_BYTES + PRIORITY_BYTES:
            raise Refused("a truncated priority")
        if len(self._rest) < whole:
            return False
        self._hold(self._taken(whole), flags)
        if flags & END_HEADERS:
            check(bytes(self._block))
            self._calls.begin(stream)
            ready += self._held
            self._held.clear()
            self._block.clear()
        return True

    def _hold(self, frame: bytes, flags: int) -> None:
        skipped = PRIORITY_BYTES if flags & HAS_PRIORITY else 0
        self._held += frame
        self._block += frame[FRAME_HEADER_BYTES + skipped :]

    def _taken(self, count: int) -> bytes:
        taken = bytes(self._rest[:count])
        del self._rest[:count]
        return taken


def check(block: bytes) -> None:
    """Check that all literals of a whole header block are ASCII. Source: RFC 7541, section 6.

    Raises:
        Refused: one is not, or it is no header block.
    """
    at = 0
    while at < len(block):
        first = block[at]
        if first & 0x80:  # a field from the table
            _, at = _integer(block, at, 7)
        elif first & 0xE0 == NEW_SIZE:  # a new size of the table
            _, at = _integer(block, at, 5)
        else:  # a literal, with a name from the table or its own
            name, at = _integer(block, at, 6 if first & 0x40 else 4)
            for _ in range(1 if name else 2):
                at = _after_text(block, at)


def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """Decode an integer; gives it and the offset after it. Source: RFC 7541, section 5.1."""
    most = (1 << bits) - 1
    value = block[at] & most
    if value < most:
        return value, at + 1
    for place, byte in enumerate(block[at + 1 : at + 1 + MAX_INTEGER_BYTES]):
        value += (byte & 0x7F) << (7 * place)
        if not byte & 0x80:
            return value, at + 2 + place
    raise Refused("a header block with an integer that does not end")


def _after_text(block: bytes, at: int) -> int:
    """Check that a text is ASCII; gives the offset after it. Source: RFC 7541, section 5.2."""
    if at >= len(block):
        raise Refused("a truncated header block")
    is_coded = bool(block[at] & 0x80)
    length, at = _integer(block, at, 7)
    text = block[at : at + length]
    if len(text) < length:
        raise Refused("a truncated header block")
    if not (is_plain_when_decoded(text) if is_coded else text.isascii()):
        raise Refused("a header that is not ASCII")
    return at + length


def is_plain_when_decoded(text: bytes) -> bool:
    """Whether a Huffman-coded text is printable ASCII, properly padded.

    Four bits a step: bit by bit, 64 KiB blocked this process for 0.13 s (2026-11).
    Source: RFC 7541, section 5.2 and appendix B.
    """
    begun = ""
    for digit in text.hex():
        after = _NEXT[begun].get(digit)
        if after is None:
            return False
        begun = after
    # The rest must be padding: less than a byte, all ones.
    return len(begun) <= MAX_PADDING_BITS and "0" not in begun


def _canonical() -> frozenset[str]:
    """Build the codes, as strings of bits."""
    codes, code, before = set(), 0, 0
    for length, letters in CODES.items():
        code <<= length - before
        codes |= {f"{code + place:0{length}b}" for place in range(len(letters))}
        code, before = code + len(letters), length
    return frozenset(codes)


def _steps() -> dict[str, dict[str, str]]:
    """Build the decoder: for each prefix of a code and hexadecimal digit, the next prefix."""
    codes = _canonical()
    beginnings = {code[:length] for code in codes for length in range(len(code))}
    steps: dict[str, dict[str, str]] = {begun: {} for begun in beginnings}
    for begun, step in steps.items():
        for digit in string.hexdigits[:16]:
            after = begun
            for bit in f"{int(digit, 16):04b}":
                after = "" if after + bit in codes else after + bit
            if after in beginnings:
                step[digit] = after
    return steps


_NEXT: Final = _steps()
