"""Descriptors that somebody attached: seen before they are read, wherever they are."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator

import pytest
from descriptors import none_left_open

from convertd_daemon.linux import scm_rights

Pair = tuple[socket.socket, socket.socket]


def attach(sock: socket.socket, data: bytes, flags: int = 0) -> None:
    """Send something, and our standard output with it."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1]))]
    sock.sendmsg([data], rights, flags)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A stranger's end, and ours."""
    theirs, ours = socket.socketpair()
    scm_rights.inline_oob(ours)
    with theirs, ours:
        yield theirs, ours


def test_data_without_descriptors_is_read_unchanged(pair: Pair) -> None:
    """Up to its end, without waiting."""
    theirs, ours = pair
    with pytest.raises(BlockingIOError):
        scm_rights.read(ours, 100)
    theirs.sendall(b"one")
    theirs.sendall(b"two")
    assert scm_rights.read(ours, 4) + scm_rights.read(ours, 100) == b"onetwo"
    theirs.close()
    assert scm_rights.read(ours, 100) == b""


@pytest.mark.parametrize("flags", [0, socket.MSG_OOB], ids=["in band", "out of band"])
@pytest.mark.parametrize("before", [b"", b"before"], ids=["first", "after others"])
def test_data_with_a_descriptor_is_never_read(pair: Pair, before: bytes, flags: int) -> None:
    """Nor anything behind it."""
    theirs, ours = pair
    theirs.sendall(before)
    attach(theirs, b"x", flags)
    theirs.sendall(b"after")
    found = []

    def read_all() -> None:
        while True:
            found.append(scm_rights.read(ours, 4))

    with none_left_open(), pytest.raises(scm_rights.Attached):
        read_all()
    assert before.startswith(b"".join(found))
    ours.shutdown(socket.SHUT_RDWR)
    assert not scm_rights.holds_none(ours)


def test_data_with_a_descriptor_that_arrives_after_the_peek_is_not_read(pair: Pair) -> None:
    """As much is read as was seen."""
    theirs, ours = pair
    theirs.sendall(b"seen")
    assert scm_rights.peeked(ours, 100, wait=False) == b"seen"
    attach(theirs, b"x")
    assert ours.recv(4) == b"seen"
    with pytest.raises(scm_rights.Attached):
        scm_rights.read(ours, 100)


def test_control_peek_without_the_option_misses_a_descriptor_on_oob_data() -> None:
    """The control: the look does not show it."""
    theirs, ours = socket.socketpair()
    with theirs, ours:
        reader, writer = os.pipe()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writer]))]
        theirs.sendmsg([b"x"], rights, socket.MSG_OOB)
        os.close(writer)
        theirs.sendall(b"after")
        assert scm_rights.read(ours, 100) == b"after"
        assert os.read(reader, 1) == b""  # the last copy of the other end is gone
        os.close(reader)


@pytest.mark.parametrize("data", [b"", b"x", b"x" * 150_000], ids=["nothing", "little", "much"])
def test_socket_without_attached_descriptors_is_recognized(pair: Pair, data: bytes) -> None:
    """However much is unread."""
    theirs, ours = pair
    theirs.sendall(data)
    ours.shutdown(socket.SHUT_RDWR)
    assert scm_rights.holds_none(ours)


def test_descriptor_behind_all_other_data_is_detected(pair: Pair) -> None:
    """As far back as a peer can put it."""
    theirs, ours = pair
    theirs.sendall(b"x" * 150_000)
    attach(theirs, b"x")
    ours.shutdown(socket.SHUT_RDWR)
    assert not scm_rights.holds_none(ours)


def test_shutdown_socket_receives_no_more_data(pair: Pair) -> None:
    """So what was seen then stays so."""
    theirs, ours = pair
    ours.shutdown(socket.SHUT_RDWR)
    with pytest.raises(BrokenPipeError):
        attach(theirs, b"x")
    assert scm_rights.holds_none(ours)
