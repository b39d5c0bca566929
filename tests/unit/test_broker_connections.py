"""Who is connected, by the kernel's word, and how many may be."""

from __future__ import annotations

import logging
import os
import socket

import grants
import pytest
from children import in_child
from descriptors import none_left_open

from convertd_core import values
from convertd_daemon import loop
from convertd_daemon.broker import connections
from convertd_daemon.sandbox import closer


def no_connections(limits: values.Limits) -> connections.Connections:
    """No connections yet."""
    return connections.Connections(limits, closer.Closer(loop.Loop().after))


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """A connection; who made it is each end's peer."""
    return socket.socketpair()


def test_peer_credentials_come_from_the_kernel() -> None:
    """With all groups; a caller can't say otherwise."""

    def act() -> values.Peer:
        os.setgroups([1300, 1400])
        os.setresgid(1235, 1235, 1235)
        os.setresuid(1234, 1234, 1234)
        ours, theirs = socket_pair()
        with ours, theirs:
            connection = no_connections(values.DEFAULT_LIMITS).admit(ours)
            assert connection is not None
            assert connection.pid == os.getpid()
            return connection.peer()

    peer = in_child(act)
    assert (peer.uid, peer.gid, peer.groups) == (1234, 1235, frozenset({1300, 1400}))


def test_connection_number_is_never_reused() -> None:
    """A front that speaks of a connection that ended speaks of nobody."""
    table = no_connections(values.DEFAULT_LIMITS)
    numbers = []
    for _ in range(3):
        ours, theirs = socket_pair()
        connection = table.admit(ours)
        assert connection is not None
        assert table.find(connection.number) is connection
        assert list(table) == [connection]
        numbers.append(connection.number)
        table.drop(connection)
        theirs.close()
        assert table.find(connection.number) is None
        assert ours.fileno() == -1
    assert len(set(numbers)) == 3
    assert len(table) == 0


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param(grants.limits(connections=2), id="in-all"),
        pytest.param(grants.limits(connections_per_user=2), id="of-a-user"),
    ],
)
def test_connection_over_the_limit_is_closed_and_logged(
    limits: values.Limits, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, with a word in the journal; when one of the others ends, there is room again."""
    table = no_connections(limits)
    pairs = [socket_pair() for _ in range(4)]
    admitted = [table.admit(ours) for ours, _ in pairs[:2]]
    with caplog.at_level(logging.WARNING):
        assert table.admit(pairs[2][0]) is None
    assert "too many connections uid=0 own=2 total=2" in caplog.text
    assert pairs[2][1].recv(1) == b""
    assert admitted[0] is not None
    table.drop(admitted[0])
    assert table.admit(pairs[3][0]) is not None
    for pair in pairs:
        for end in pair:
            end.close()


def test_repeated_refused_connections_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """One line in a while says that somebody has too many connections."""
    table = no_connections(grants.limits(connections_per_user=0))
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            ours, theirs = socket_pair()
            assert table.admit(ours) is None
            theirs.close()
    assert 1 <= caplog.text.count("too many connections uid=0") < 10


@pytest.mark.parametrize("half", [True, False], ids=["half", "all"])
def test_connection_whose_peer_left_the_backlog_is_closed(*, half: bool) -> None:
    """Nobody carries it, and nothing is logged of it."""
    table = no_connections(values.DEFAULT_LIMITS)
    with none_left_open():
        ours, theirs = socket_pair()
        with theirs:
            if half:
                theirs.shutdown(socket.SHUT_WR)
            else:
                theirs.close()
            assert table.admit(ours) is None
        assert ours.fileno() == -1
    assert len(table) == 0


def test_connection_with_unknown_credentials_is_closed() -> None:
    """It is nobody's, and takes nobody's place."""
    table = no_connections(values.DEFAULT_LIMITS)
    with none_left_open(), pytest.raises(OSError, match="not connected"):
        table.admit(socket.socket(socket.AF_UNIX))
    assert len(table) == 0
