"""What of a peer's bytes reaches gRPC: all, unless a header block is not plain text."""

from __future__ import annotations

import contextlib
import itertools
import struct

import pytest
from hostile import http2
from hostile.http2 import Kind
from hypothesis import given
from hypothesis import strategies as some

from convertd_daemon.front import header_filter, streams

RFC_EXAMPLE = bytes.fromhex("f1e3c2e5f23a6ba0ab90f4ff")
"""www.example.com. Source: RFC 7541, C.4.1."""


def passed(data: bytes, *cuts: int) -> bytes:
    """What passes a screen of bytes that come in pieces."""
    one, slots = (
        header_filter.HeaderFilter(streams.Streams()),
        sorted({0, *(cut % (len(data) + 1) for cut in cuts), len(data)}),
    )
    return b"".join(
        b"".join(piece.data for piece in one.pieces(data[a:b]))
        for a, b in itertools.pairwise(slots)
    )


def headers(block: bytes, flags: int = http2.END_HEADERS) -> bytes:
    """A connection that begins with this header block."""
    return http2.opening(http2.frame(Kind.HEADERS, block, flags=flags, stream=1))


def coded(text: bytes) -> bytes:
    """A header block with a path that is said in Huffman's code."""
    return b"\x04" + bytes([0x80 | len(text)]) + text


@given(some.lists(some.integers(0, 10_000)))
def test_grpc_calls_pass_the_header_filter_however_they_are_split(cuts: list[int]) -> None:
    """Byte by byte, too."""
    data = http2.opening(http2.call(1, b"a" * 300), http2.frame(Kind.PING, bytes(8)), http2.call(3))
    assert passed(data, *cuts) == data


@given(some.binary(max_size=400), some.lists(some.integers(0, 500)))
def test_header_filter_output_is_a_prefix_of_its_input(noise: bytes, cuts: list[int]) -> None:
    """Whatever comes, what passes is a beginning of it, or the connection ends."""
    data = http2.opening(noise)
    with contextlib.suppress(header_filter.Refused):
        assert data.startswith(passed(data, *cuts))


@given(some.binary(max_size=60))
def test_random_header_block_is_plain_text_or_refused(block: bytes) -> None:
    """Noise raises nothing that the relay does not expect."""
    with contextlib.suppress(header_filter.Refused):
        header_filter.check(block)


def test_header_block_in_several_frames_passes_when_it_is_complete() -> None:
    """Nothing of it before: its last letter might be the one that is not plain."""
    block = http2.block()
    first = http2.opening(http2.frame(Kind.HEADERS, block[:9], stream=1))
    more = http2.frame(Kind.CONTINUATION, block[9:20], stream=1)
    last = http2.frame(Kind.CONTINUATION, block[20:], flags=http2.END_HEADERS, stream=1)
    one = header_filter.HeaderFilter(streams.Streams())
    assert list(one.pieces(first)) == [(http2.opening(), False)]
    assert not list(one.pieces(more))
    assert list(one.pieces(last)) == [(first[len(http2.opening()) :] + more + last, True)]


def test_header_filter_passes_one_header_block_at_a_time() -> None:
    """And what belongs to its call: the next is not even looked through before it was taken."""
    calls = [http2.call(1), http2.call(3, b"a" * 300), http2.frame(Kind.PING, bytes(8))]
    bad = http2.frame(Kind.HEADERS, b"\xff", flags=http2.END_HEADERS, stream=5)
    pieces = header_filter.HeaderFilter(streams.Streams()).pieces(http2.opening(*calls, bad))
    assert next(pieces) == (http2.opening(), False)
    assert next(pieces) == (calls[0], True)
    assert next(pieces) == (calls[1] + calls[2], True)
    with pytest.raises(header_filter.Refused):
        next(pieces)


def test_priority_fields_are_not_part_of_the_header_block() -> None:
    """Some clients still send one."""
    data = headers(b"\xff\xff\xff\xff\xff" + http2.block(), flags=http2.END_HEADERS | 0x20)
    assert passed(data) == data


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(b"\x82\x84\x87", id="fields-of-the-table"),
        pytest.param(b"\x3f\xe1\x1f", id="a-new-size-of-the-table"),
        pytest.param(b"\x44\x01/", id="a-path-to-keep"),
        pytest.param(b"\x14\x01/", id="a-path-never-to-keep"),
        pytest.param(b"\x40\x01a\x01b", id="a-name-of-its-own"),
        pytest.param(b"\x7f\x10\x01b", id="a-name-of-an-earlier-block"),
        pytest.param(b"\x04\x7f\x08" + b"a" * 135, id="a-long-text"),
        pytest.param(coded(RFC_EXAMPLE), id="a-coded-text"),
        pytest.param(coded(b""), id="an-empty-text"),
        pytest.param(coded(bytes.fromhex("fffe1f")), id="a-coded-backslash"),
    ],
)
def test_plain_text_header_passes(block: bytes) -> None:
    """In each of the ways in which it can be said."""
    assert passed(headers(block)) == headers(block)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(b"\x04\x02/\xf4", id="a-path"),
        pytest.param(b"\x44\x02/\xf4", id="a-path-to-keep"),
        pytest.param(b"\x14\x02/\xf4", id="a-path-never-to-keep"),
        pytest.param(b"\x00\x01\xc3\x01a", id="a-name"),
        pytest.param(b"\x82\x00\x01a\x02\xc3\xa9", id="a-value-that-is-utf-8"),
        pytest.param(coded(bytes.fromhex("fffe3f")), id="a-coded-letter-that-is-not-ascii"),
        pytest.param(coded(bytes.fromhex("fffe5f")), id="a-coded-letter-that-is-nearly-as-long"),
        pytest.param(coded(bytes.fromhex("ffffff")), id="a-coded-end"),
        pytest.param(coded(RFC_EXAMPLE + b"\xff"), id="padding-of-a-byte"),
        pytest.param(coded(b"\x18"), id="padding-of-noughts"),
        pytest.param(b"\x04\x02/", id="a-text-that-is-cut-off"),
        pytest.param(b"\x04", id="no-text"),
        pytest.param(b"\x04\x7f\xff\xff\xff\xff\xff\x01", id="a-length-without-end"),
        pytest.param(b"\xff", id="an-index-without-end"),
    ],
)
def test_header_that_is_not_plain_text_is_refused(block: bytes) -> None:
    """The connection is over before gRPC sees it."""
    with pytest.raises(header_filter.Refused):
        passed(headers(block))


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param(http2.frame(Kind.HEADERS, b"\0", flags=0x0C, stream=1), id="padding"),
        pytest.param(http2.frame(Kind.CONTINUATION, b"", flags=4, stream=1), id="a-continuation"),
        pytest.param(
            http2.frame(Kind.HEADERS, b"\x82", stream=1) + http2.frame(Kind.PING, bytes(8)),
            id="a-block-that-is-interrupted",
        ),
        pytest.param(
            http2.frame(Kind.HEADERS, b"\x04\x04", flags=0x20, stream=1)
            + http2.frame(Kind.CONTINUATION, b"/\xff\xfe/\x83\x86", flags=4, stream=1),
            id="a-priority-that-is-cut-off",
        ),
        pytest.param(struct.pack(">I", 70_000)[1:] + b"\x01\x04\0\0\0\x01", id="a-long-block"),
        pytest.param(
            http2.frame(Kind.HEADERS, b"\x82", stream=1)
            + http2.frame(Kind.CONTINUATION, b"\x82" * 16000, stream=1) * 5,
            id="a-block-without-end",
        ),
    ],
)
def test_http2_frames_that_clients_do_not_send_are_refused(frames: bytes) -> None:
    """Those about which gRPC might think differently than we do."""
    with pytest.raises(header_filter.Refused):
        passed(http2.opening(frames))
