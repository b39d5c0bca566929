"""Which calls go on, by what passes: cut anywhere, and whoever ends them."""

from __future__ import annotations

import itertools
import socket

import pytest
from hostile import http2
from hostile.http2 import Kind
from hypothesis import given
from hypothesis import strategies as st

from convertd_daemon.front import header_filter, relay, streams

REPLY = b"".join(
    (
        http2.frame(Kind.SETTINGS, bytes(6)),
        http2.frame(Kind.HEADERS, b"begun", flags=4, stream=1),
        http2.frame(Kind.DATA, b"x" * 70_000, stream=1),
        http2.frame(Kind.DATA, stream=1),
        http2.frame(Kind.HEADERS, b"over", flags=5, stream=1),
        http2.frame(Kind.RST_STREAM, bytes(4), stream=3),
        http2.frame(Kind.DATA, b"over", flags=1, stream=5),
        http2.frame(Kind.PING, bytes(8), flags=1),
    )
)


def begun(*numbers: int) -> streams.Streams:
    """A connection with these calls."""
    calls = streams.Streams()
    for number in numbers:
        calls.begin(number)
    return calls


@given(st.lists(st.integers(0, len(REPLY)), max_size=8))
def test_call_ends_with_the_last_frame_of_its_reply_however_it_is_split(cuts: list[int]) -> None:
    """By its last frame, whichever that is, and not before."""
    calls = begun(1, 3, 5, 7)
    for a, b in itertools.pairwise(sorted({0, *cuts, len(REPLY)})):
        calls.answered(REPLY[a:b])
    assert (len(calls), calls.ended) == (1, 3)


def test_call_continues_while_its_reply_does() -> None:
    """Headers and data are not its end."""
    calls = begun(1)
    calls.answered(http2.frame(Kind.HEADERS, b"begun", flags=4, stream=1))
    calls.answered(http2.frame(Kind.DATA, b"1", stream=1))
    assert len(calls) == 1
    calls.end(9)
    assert (len(calls), calls.ended) == (1, 0)


def test_calls_begun_and_reset_by_a_peer_are_counted() -> None:
    """By the screen that its bytes pass."""
    calls = streams.Streams()
    asked = http2.opening(http2.call(1), http2.call(3))
    tuple(
        header_filter.HeaderFilter(calls).pieces(
            asked + http2.frame(Kind.RST_STREAM, bytes(4), stream=1)
        )
    )
    assert (len(calls), calls.ended) == (1, 1)


@pytest.fixture
def relayed() -> relay.RelayedConnection:
    """A connection with two calls."""
    return relay.RelayedConnection(number=1, uid=2, downstream=socket.socket(), streams=begun(1, 3))


def test_connection_is_idle_when_its_peer_took_no_reply_for_long(
    relayed: relay.RelayedConnection,
) -> None:
    """However much is read; one call that ends is enough to go on."""
    with relayed.downstream:
        assert not relayed.is_idle(0.0, 20.0)
        assert not relayed.is_idle(20.0, 20.0)
        assert relayed.is_idle(20.1, 20.0)
        relayed.streams.end(1)
        assert not relayed.is_idle(20.2, 20.0)
        assert relayed.is_idle(40.3, 20.0)


def test_connection_is_not_idle_while_replies_are_prepared(
    relayed: relay.RelayedConnection,
) -> None:
    """A conversion lasts as long as it lasts."""
    with relayed.downstream:
        relayed.streams.running = 2
        assert not relayed.is_idle(0.0, 20.0)
        assert not relayed.is_idle(1000.0, 20.0)
