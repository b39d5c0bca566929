"""What the manager is told. Source: sd_notify(3)."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from convertd_daemon.service import notify


@pytest.fixture(params=["a path", "an abstract name"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """A manager, where NOTIFY_SOCKET says."""
    named = {"a path": str(tmp_path / "notify"), "an abstract name": f"@convertd-{os.getpid()}"}
    name = named[request.param]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.bind(name.replace("@", "\0"))
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield sock


def test_each_state_change_sends_one_notify_message(manager: socket.socket) -> None:
    """As systemd 252 wants them: Type=notify, RELOADING with the time."""
    before = time.monotonic_ns() // 1000
    notify.ready()
    notify.reloading()
    notify.stopping(45)
    notify.status("2 conversions running")
    assert manager.recv(4096) == b"READY=1"
    reloading, moment = manager.recv(4096).decode().split("\n")
    assert reloading == "RELOADING=1"
    assert before <= int(moment.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    assert manager.recv(4096) == b"STOPPING=1\nEXTEND_TIMEOUT_USEC=45000000"
    assert manager.recv(4096) == b"STATUS=2 conversions running"


def test_full_notify_socket_does_not_block_the_daemon(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its queue takes a few messages; what is only for people is dropped then."""
    monkeypatch.setattr(notify, "PATIENCE_S", 120.0)
    for _ in range(1000):
        notify.status("x")
    began = time.monotonic()
    notify.status("y")
    assert time.monotonic() - began < 120
    assert manager.recv(4096) == b"STATUS=x"


@pytest.mark.parametrize("address", ["", "relative", "unix:/x"])
def test_missing_notify_socket_is_no_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that is no error."""
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify.ready()


def test_dead_notify_socket_is_logged_and_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a line in the log."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    with caplog.at_level(logging.WARNING):
        notify.ready()
    assert "can't notify systemd" in caplog.text
