"""A user who asks for much and takes nothing: HTTP/2 windows of 0, on sockets that are read.

What gRPC may not send it keeps, while the relay sees a peer that reads all there is.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness import waiting
from harness.callers import PYTHON, Caller

from hostile import http2
from hostile.http2 import Kind

_ATTACK: Final = """
import json, select, socket, sys, time
order = json.loads(sys.stdin.readline())
opening, calls = (bytes.fromhex(order[name]) for name in ("opening", "calls"))
poll, socks, made, said, begun, anew = select.poll(), {}, 0, 0, False, False
PING, ACK = 6, 1
poll.register(sys.stdin, select.POLLIN)
def connect():
    global made
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(5)
        sock.connect(order["path"])
        sock.setblocking(False)
    except OSError:
        sock.close()
        return
    socks[sock.fileno()] = [sock, bytearray(), bytearray(opening + calls)]
    poll.register(sock, select.POLLIN | select.POLLOUT)
    made += 1
def end(fd):
    poll.unregister(fd)
    socks.pop(fd)[0].close()
def serve(fd, events):
    global said
    sock, heard, to_say = socks[fd]
    if events & select.POLLIN:
        data = sock.recv(65536)
        if not data:
            return end(fd)
        said += len(data)
        heard += data
        while len(heard) >= 9 and len(heard) >= 9 + int.from_bytes(heard[:3], "big"):
            length, kind, flags = int.from_bytes(heard[:3], "big"), heard[3], heard[4]
            if kind == PING and not flags & ACK:
                to_say += b"\\0\\0\\x08\\6\\1\\0\\0\\0\\0" + heard[9:17]
            del heard[:9 + length]
    if events & select.POLLOUT and to_say:
        del to_say[:sock.send(to_say)]
    poll.modify(fd, select.POLLIN | (select.POLLOUT if to_say else 0))
while True:
    while len(socks) < order["connections"]:
        before = len(socks)
        connect()
        if len(socks) == before:
            break
    if len(socks) == order["connections"] and not begun:
        print("begun", flush=True)
        begun = True
    if begun and made > order["connections"] and not anew:
        print("anew", flush=True)
        anew = True
    for fd, events in poll.poll(50):
        if fd == sys.stdin.fileno():
            print(json.dumps({"made": made, "bytes": said}))
            sys.exit()
        try:
            serve(fd, events)
        except OSError:
            end(fd)
"""


CONNECTIONS: Final = 124
"""Some fewer than one user may have."""


@dataclass(slots=True)
class Done:
    """What became of it: the numbers once it is over."""

    process: subprocess.Popen[bytes]
    connections: int = 0
    bytes: int = 0

    @property
    def has_connected_anew(self) -> bool:
        """Whether a connection was ended, and another one made in its place."""
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], 0)[0])


@contextlib.contextmanager
def unread(
    caller: Caller,
    path: Path,
    *calls: bytes,
    connections: int = CONNECTIONS,
    window: int = 0,
) -> Iterator[Done]:
    """Make these calls on each of so many connections, and take no reply; those that end anew."""
    settings = http2.frame(Kind.SETTINGS, b"\0\4" + window.to_bytes(4))
    order = {
        "path": str(path),
        "connections": connections,
        "opening": (http2.PREFACE + settings).hex(),
        "calls": b"".join(calls).hex(),
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with caller.popen([PYTHON, "-I", "-c", _ATTACK], **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"begun\n"
        done = Done(process)
        try:
            yield done
        finally:
            output, _ = process.communicate(b"end\n", timeout=waiting.DEADLINE_S)
            told = json.loads(output.splitlines()[-1])
            done.connections, done.bytes = told["made"], told["bytes"]
