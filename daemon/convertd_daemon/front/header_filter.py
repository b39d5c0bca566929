"""What a peer's bytes must be before gRPC sees them: header blocks of plain text. Fails closed.

grpcio's asyncio server decodes the path of a call as UTF-8 in the loop that takes all calls. One
path that is none ended that loop, and with it the service, for everybody (grpcio 1.85, measured
2026-11). So each header block is looked through before it is passed on, and a connection that sends
other text than ASCII in one is over. Names and values that stand in a table need no look: they are
HTTP/2's own, or were spelled out in an earlier block. What the frames mean is gRPC's business.

No client needs more: gRPC sends what is not ASCII in base64, unless the server offers to take true
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
"""What such a frame may have. Not PADDED, of which implementations think differently."""
PRIORITY_BYTES: Final = 5
"""Whole in its frame, or refused: gRPC takes what there is of a shorter one for the beginning of
the block, and so reads that from another byte on than we do (grpcio 1.85, measured 2026-11)."""

MAX_BLOCK_BYTES: Final = 32 * 1024
"""More than gRPC takes. To look through so many takes 16 ms, in one turn (2026-11)."""

MAX_INTEGER_BYTES: Final = 4
"""No length and no index in such a block needs more."""

NEW_SIZE: Final = 0x20
"""What the first three bits of a block's field say, if it is a new size of the table."""

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
"""HPACK's Huffman code by length in bits: it is canonical, so that the order of the letters tells
their codes. Other codes stand for other controls, and for what is not ASCII."""

MAX_PADDING_BITS: Final = 7


class Refused(Exception):
    """The peer sent what no client of gRPC sends; the connection must end."""


class Piece(NamedTuple):
    """Bytes that may go on, and whether a call begins with them."""

    data: bytes
    begins_call: bool


class HeaderFilter:
    """Looks through what one peer sends, in pieces as they come."""

    def __init__(self, calls: streams.Streams) -> None:
        """Begin with the preface. The calls that the peer begins and ends are told."""
        self._calls = calls
        self._rest = bytearray()
        self._unseen = PREFACE_BYTES
        self._held = bytearray()
        self._block = bytearray()

    def pieces(self, data: bytes) -> Iterator[Piece]:
        """Take what came, and give what may go on now: all but an unfinished header block.

        In pieces, each of which has one header block at most. None is looked through before the
        piece ahead of it was taken.

        Raises:
            Refused: nothing of this connection may go on any more.
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
        """Deal with one frame; False if that takes more data. Its payload may be left unseen."""
        if len(self._rest) < FRAME_HEADER_BYTES:
            return False
        whole = FRAME_HEADER_BYTES + int.from_bytes(self._rest[:3])
        kind, flags = self._rest[3:5]
        if bool(self._held) is not (kind == CONTINUATION):
            raise Refused("a header block that is not continued, or a continuation of none")
        stream = int.from_bytes(self._rest[5:9]) & 0x7FFFFFFF
        if kind == streams.RST_STREAM:
            self._calls.end(stream)
        if kind not in FLAGS:
            self._unseen = whole
            return True
        if flags & ~FLAGS[kind] or len(self._held) + whole > MAX_BLOCK_BYTES:
            raise Refused("a header block of an unusual kind or length")
        if flags & HAS_PRIORITY and whole < FRAME_HEADER_BYTES + PRIORITY_BYTES:
            raise Refused("a priority that is cut off")
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
    """Check that a whole header block spells out ASCII only. Source: RFC 7541, section 6.

    Raises:
        Refused: it does not, or it is no header block.
    """
    at = 0
    while at < len(block):
        first = block[at]
        if first & 0x80:  # a field of the table
            _, at = _integer(block, at, 7)
        elif first & 0xE0 == NEW_SIZE:  # a new size of the table
            _, at = _integer(block, at, 5)
        else:  # a literal: with a name of the table, or one of its own
            name, at = _integer(block, at, 6 if first & 0x40 else 4)
            for _ in range(1 if name else 2):
                at = _after_text(block, at)


def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """An integer, and where it ends. Source: RFC 7541, section 5.1."""
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
    """Where a text ends, once it is seen to be ASCII. Source: RFC 7541, section 5.2."""
    if at >= len(block):
        raise Refused("a header block that is cut off")
    is_coded = bool(block[at] & 0x80)
    length, at = _integer(block, at, 7)
    text = block[at : at + length]
    if len(text) < length:
        raise Refused("a header block that is cut off")
    if not (is_plain_when_decoded(text) if is_coded else text.isascii()):
        raise Refused("a header that is not ASCII")
    return at + length


def is_plain_when_decoded(text: bytes) -> bool:
    """Whether a Huffman-coded text is one of printable ASCII, properly padded.

    Four bits a step: bit by bit, 64 KiB held up everybody in this process for 0.13 s (2026-11).
    Source: RFC 7541, section 5.2 and appendix B.
    """
    begun = ""
    for digit in text.hex():
        after = _NEXT[begun].get(digit)
        if after is None:
            return False
        begun = after
    # What is left over has to be padding: less than a byte, and all ones.
    return len(begun) <= MAX_PADDING_BITS and "0" not in begun


def _canonical() -> frozenset[str]:
    """The codes, in bits."""
    codes, code, before = set(), 0, 0
    for length, letters in CODES.items():
        code <<= length - before
        codes |= {f"{code + place:0{length}b}" for place in range(len(letters))}
        code, before = code + len(letters), length
    return frozenset(codes)


def _steps() -> dict[str, dict[str, str]]:
    """For each beginning of a code, what of a code is begun after another hexadecimal digit."""
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
