"""The watchdog's probe, on a real socket, reaches whoever accepts, however many others connect."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from children import in_child

from convertd_core import messages
from convertd_daemon import loop
from convertd_daemon.service import watchdog


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """A socket with room for few in its backlog."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        sock.listen(1)
        yield sock


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let systemd want to hear of us, though not while the test runs."""
    monkeypatch.setenv("WATCHDOG_USEC", "3600000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)


@contextlib.contextmanager
def crowd(listener: socket.socket) -> Iterator[None]:
    """As many connections as there is room for."""
    with contextlib.ExitStack() as stack:
        while True:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.setblocking(False)
            try:
                sock.connect(listener.getsockname())
            except BlockingIOError:
                break
        yield


def test_watchdog_probe_connects_when_the_full_backlog_gets_room(
    listener: socket.socket, asked: None
) -> None:
    """Whoever keeps the backlog full does not keep us from saying that we live."""
    assert asked is None
    sent: list[object] = []

    def send(message: object, descriptor: int) -> None:
        sent.append(message)
        os.close(descriptor)

    one = watchdog.Watchdog(loop.Loop(), listener, send, lambda: False)
    with crowd(listener):
        one.tick()
        one.on_accept()  # by somebody who took another's place at once
        assert not sent
        listener.accept()[0].close()
        one.on_accept()
        assert [type(message) for message in sent] == [messages.Probe]
        one.on_accept()
        assert len(sent) == 1


def test_slow_watchdog_probe_counts_within_the_systemd_timeout(
    listener: socket.socket, asked: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crowd may have been before it in the backlog."""
    assert asked is None
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    one = watchdog.Watchdog(
        loop.Loop(), listener, lambda _, descriptor: os.close(descriptor), lambda: False
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as manager:
        manager.bind(str(tmp_path / "notify"))
        for _ in range(watchdog.PROBES_PER_LIMIT):
            one.tick()
            listener.accept()[0].close()
        one.on_answer(1)
        assert manager.recv(4096) == b"WATCHDOG=1"
        one.tick()
        one.on_answer(1)
        with pytest.raises(BlockingIOError):
            manager.recv(4096)


def test_watchdog_probe_is_skipped_without_a_free_descriptor(
    listener: socket.socket, asked: None
) -> None:
    """The loop that called goes on: callers who leave give some back."""
    assert asked is None
    one = watchdog.Watchdog(loop.Loop(), listener, lambda *_: None, lambda: False)

    def probe() -> str:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        one.tick()
        return "lives"

    assert in_child(probe) == "lives"
