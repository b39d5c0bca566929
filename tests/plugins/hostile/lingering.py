"""Whoever attaches to what it sends a TCP socket whose last close takes as long as it chose.

And a daemon on a kernel that can't refuse that: Linux before 6.16 has no SO_PASSRIGHTS.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

from harness import waiting
from harness.callers import MALLORY, PYTHON
from harness.daemon import Daemon

from convertd_daemon.linux import libseccomp

SO_PASSRIGHTS: Final = 83
LINGER_S: Final = 30

SOON_S: Final = 5.0
"""Whoever waits for less did not wait for a close. A call takes milliseconds on an idle machine."""


def as_before_6_16() -> tuple[str, ...]:
    """What to start a daemon with, so that setting the option is answered as older kernels do."""
    compiled = libseccomp.compile_rules(
        [
            libseccomp.Rule(
                call="setsockopt",
                answer=errno.ENOPROTOOPT,
                conditions=(
                    libseccomp.Condition(
                        argument=2, compare=libseccomp.Compare.EQ, value=SO_PASSRIGHTS
                    ),
                ),
            )
        ]
    )
    return (sys.executable, "-c", _BEFORE, compiled.hex())


_BEFORE: Final = """
import os, sys
from convertd_daemon.linux import seccomp
seccomp.set_mode_filter(bytes.fromhex(sys.argv[1]))
os.execvp(sys.argv[2], sys.argv[2:])
"""


def lingering(seconds: int = LINGER_S) -> tuple[socket.socket, tuple[socket.socket, ...]]:
    """A connected socket with unsent data, and what keeps its other end from reading."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    listener.listen()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sock.connect(listener.getsockname())
    other, _ = listener.accept()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(b"x" * 65536)
    return sock, (listener, other)


def attached(sock: socket.socket) -> list[tuple[int, int, array.array[int]]]:
    """The socket, as sendmsg(2) takes it along."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sock.fileno()]))]


_ATTACK: Final = """
import array, contextlib, json, socket, struct, sys
path, how, count, linger_s = json.loads(sys.argv[1])
GREETING = b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
kept, ends, outcomes = [], [], []

def lingering():
    listener = socket.socket(); listener.bind(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048); listener.listen()
    sock = socket.socket(); sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sock.connect(listener.getsockname()); other, _ = listener.accept()
    kept.extend((listener, other))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, linger_s))
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(b"x" * 65536)
    return sock

def connected():
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock

if how == "over the cap":
    for _ in range(140):
        kept.append(connected())
for _ in range(count):
    hostile, sock = lingering(), connected()
    flags, ends_itself = 0, how in ("and is gone", "over the cap")
    if how == "in the middle":
        sock.sendall(GREETING)
        sock.recv(1)
    if how == "after a part":
        sock.sendall(GREETING[:10])
    if how == "out of band":
        flags = socket.MSG_OOB
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [hostile.fileno()]))]
    try:
        sock.sendmsg([b"P"], rights, flags)
        outcomes.append("sent")
        ends.append(sock)
    except OSError as error:
        outcomes.append(type(error).__name__)
        kept.append(hostile)  # to close it would take as long here
    else:
        hostile.close()
    if ends_itself:
        sock.close()
if how == "and does not wait":
    ends.clear()
for sock in ends:
    if sock.fileno() >= 0:
        with contextlib.suppress(ConnectionError):
            while sock.recv(4096):
                pass
print(json.dumps(outcomes), flush=True)
sys.stdin.read()
"""


class Attack:
    """The attacker's process. `outcomes` is what became of each sendmsg(2), once it is known."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def is_heard(self) -> bool:
        """Whether every connection that brought something was ended, or nothing was let through."""
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    @property
    def outcomes(self) -> list[str]:
        """One for each connection. Waits for them."""
        assert self._process.stdout is not None
        waiting.until(lambda: self.is_heard, "the attacker's connections are ended")
        found: list[str] = json.loads(self._process.stdout.readline())
        return found


@contextlib.contextmanager
def attacking(daemon: Daemon, how: str, count: int) -> Iterator[Attack]:
    """Somebody without any grant, who does this on so many connections."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    order = json.dumps([str(daemon.socket), how, count, LINGER_S])
    with MALLORY.popen([PYTHON, "-I", "-c", _ATTACK, order], **pipes) as process:
        try:
            yield Attack(process)
        finally:
            process.kill()


def seconds_of(act: object) -> float:
    """How long something takes."""
    assert callable(act)
    began = time.monotonic()
    act()
    return time.monotonic() - began
