"""Sockets with something attached are closed by a process that nobody waits for."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from descriptors import none_left_open
from hostile import lingering

from convertd_daemon import loop
from convertd_daemon.sandbox import closer, forking


@pytest.fixture
def hostile() -> Iterator[socket.socket]:
    """A connection that brought a socket whose last close lingers."""
    theirs, ours = socket.socketpair()
    sock, others = lingering.lingering()
    theirs.sendmsg([b"x"], lingering.attached(sock))
    sock.close()
    theirs.close()
    yield ours
    for one in others:
        one.close()


def run_until_reaped(
    a_loop: loop.Loop, closing: closer.Closer, others: frozenset[int] = frozenset()
) -> None:
    """Serve until a process was forked, beside others, and has ended."""

    def reap() -> None:
        for pid in closing.processes - others:
            if os.waitpid(pid, os.WNOHANG)[0]:
                assert closing.ended(pid)
                a_loop.stop()
        a_loop.after(0.01, reap)

    reap()
    a_loop.run()


def test_socket_without_descriptors_is_closed_by_the_broker() -> None:
    """By the broker itself, whatever is unread."""
    theirs, ours = socket.socketpair()
    with theirs:
        theirs.sendall(b"x")
        closing = closer.Closer(loop.Loop().after)
        closing.close(ours)
        assert ours.fileno() == -1
        assert not closing.processes


def test_socket_with_descriptors_is_closed_by_a_child_process(
    hostile: socket.socket,
) -> None:
    """Which is the last to have it, and does not linger, for it exits."""
    a_loop, began = loop.Loop(), time.monotonic()
    closing = closer.Closer(a_loop.after)
    number = hostile.fileno()
    closing.close(hostile)
    run_until_reaped(a_loop, closing)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    assert time.monotonic() - began < lingering.SOON_S


def test_closing_one_of_two_copies_of_a_socket_does_not_block(
    hostile: socket.socket,
) -> None:
    """So the front is not held up as long as the broker has its own."""
    a_loop, began = loop.Loop(), time.monotonic()
    closing = closer.Closer(a_loop.after)
    hostile.dup().close()
    closing.take(hostile)
    run_until_reaped(a_loop, closing)
    assert time.monotonic() - began < lingering.SOON_S


def test_sockets_to_close_are_queued_while_too_many_children_hang(
    hostile: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what waits is bounded; when one of them has ended the rest is closed."""
    monkeypatch.setattr(closer, "MOST_HELD", 1)
    a_loop = loop.Loop()
    closing = closer.Closer(a_loop.after)
    hanging = frozenset(range(10**8, 10**8 + closer.MOST_PROCESSES))
    closing.processes |= hanging
    closing.close(hostile)
    held: list[bool] = []

    def end_one() -> None:
        held.append(closing.processes == hanging and closing.is_full)
        closing.processes.clear()

    a_loop.after(4 * closer.BATCH_S, end_one)
    run_until_reaped(a_loop, closing, hanging)
    assert held == [True]
    assert not closing.is_full
    assert not closing.ended(min(hanging))


def test_many_sockets_are_closed_in_parallel(
    hostile: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sends many would else keep others from being accepted."""
    monkeypatch.setattr(closer, "AT_ONCE", 1)
    a_loop = loop.Loop()
    closing = closer.Closer(a_loop.after)
    closing.close(hostile)
    assert len(closing.processes) == 1
    run_until_reaped(a_loop, closing)


def test_child_closes_its_copies_before_its_parent_does() -> None:
    """Also of what it never uses, such as another job's channel."""
    with none_left_open():
        reader, writer = os.pipe()
        end, child_lives = os.pipe()
        pid = forking.fork(lambda: read_one(end), keep=(end,))
        os.close(writer)
        assert os.read(reader, 1) == b""
        for fd in (reader, end, child_lives):
            os.close(fd)
        os.waitpid(pid, 0)


def read_one(end: int) -> None:
    """Wait until the other end is closed."""
    os.read(end, 1)


def fail() -> None:
    """Raise what nobody expects."""
    raise RuntimeError


@pytest.mark.parametrize(("child", "expected"), [(lambda: None, 0), (fail, 1), (sys.exit, 1)])
def test_forked_child_never_returns_into_its_parents_code(
    child: Callable[[], None], expected: int
) -> None:
    """It exits, whatever it raises."""
    with none_left_open():
        _, status = os.waitpid(forking.fork(child), 0)
        assert os.waitstatus_to_exitcode(status) == expected


def test_forked_child_has_no_signal_handler_of_its_parent() -> None:
    """It would take a signal to the child for its own."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        pid = forking.fork(wait_for_a_signal)
    finally:
        signal.signal(signal.SIGTERM, before)
    os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM


def wait_for_a_signal() -> None:
    """Take signals, and do nothing."""
    forking.unblock_signals()
    signal.pause()


def test_failed_fork_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when there is no process to be had."""

    def refused() -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "fork", refused)
    with none_left_open(), pytest.raises(BlockingIOError):
        forking.fork(lambda: None)
