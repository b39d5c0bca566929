"""A real daemon whose front is compromised: the test sends to its broker instead.

Nothing of the daemon is replaced. It starts its front as always, as its own user and with one
descriptor. But the environment has a `sitecustomize` that Python runs first, and that hands the
descriptor to the test instead of serving. It is then the test that lies.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from harness import waiting
from harness.callers import PYTHON, Caller
from harness.daemon import Daemon

from convertd_core import messages
from convertd_daemon import channel
from convertd_daemon.linux import scm_rights

T = TypeVar("T")


_SITECUSTOMIZE: Final = """
import sys
if sys.orig_argv[2:4] == ["-m", "convertd_daemon.front"]:
    import array, ctypes, os, socket
    with socket.socket(fileno=3) as line:
        line.send(b'["Ready",{}]')
        test = socket.socket(socket.AF_UNIX)
        test.connect(os.environ["CONVERTD_TEST_FRONT"])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [line.fileno()]))]
        test.sendmsg([b"x"], rights)
    # Of the right name, for whoever looks for it; lives until the test or the broker ends it.
    ctypes.CDLL(None).prctl(15, b"convertd-front", 0, 0, 0)
    test.recv(1)
    os._exit(0)
"""

_CONNECT: Final = """
import socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    print(flush=True)
    sys.stdin.read()
"""


class CompromisedFront:
    """The front's end of the channel, in the test's hands; the next front's after a kill."""

    def __init__(self, home: Path) -> None:
        """Wait in `home` for fronts that report."""
        self.home = home
        home.chmod(0o755)
        (home / "sitecustomize.py").write_text(_SITECUSTOMIZE, encoding="utf-8")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(home / "here"))
        (home / "here").chmod(0o666)
        self._listener.listen()
        self._reporter: socket.socket | None = None
        self._calls = 0
        self.channel = channel.Channel(socket.socket())

    @property
    def wrapper(self) -> tuple[str, ...]:
        """What the daemon must be started with."""
        return ("env", f"PYTHONPATH={self.home}", f"CONVERTD_TEST_FRONT={self.home}/here")

    def take_over(self) -> None:
        """Become the front that the broker started last; whatever one was before ends."""
        self._let_go()
        self._listener.settimeout(waiting.DEADLINE_S)
        self._reporter, _ = self._listener.accept()
        _, ancillary, _, _ = self._reporter.recvmsg(1, socket.CMSG_SPACE(4))
        (descriptor,) = array.array("i", ancillary[0][2])
        self.channel = channel.Channel(socket.socket(fileno=descriptor))

    def take_over_next(self, daemon: Daemon) -> None:
        """Become the front that replaces the one before, and wait until it serves."""
        daemon.await_notice("READY=1")
        self.take_over()

    def close_channel(self) -> None:
        """Close the channel, and live on."""
        self.channel.close()

    def close(self) -> None:
        """Be gone."""
        self._let_go()
        self._listener.close()

    def call(self) -> int:
        """A number for a call that no other has."""
        self._calls += 1
        return self._calls

    def receive(self, deadline_s: float = waiting.DEADLINE_S) -> tuple[Any, list[int]]:
        """The next message, and the descriptors that came along.

        Raises:
            channel.Closed: the broker has had enough of this front.
        """
        ready, _, _ = select.select([self.channel], [], [], deadline_s)
        assert ready, "the broker said nothing"
        return self.channel.receive(*messages.FROM_BROKER, most_descriptors=channel.ONE_DESCRIPTOR)

    def await_message(self, kind: type[T], call: int = 0) -> tuple[T, list[int]]:
        """The next message of a kind, or what a reply says, to a call if one is given.

        Others are dropped.
        """
        while True:
            message, descriptors = self.receive()
            told, number = message, 0
            if isinstance(message, messages.Reply):
                told, number = message.body, message.call
            if isinstance(told, kind) and call in {0, number}:
                return told, descriptors
            scm_rights.close_all(descriptors)

    def ask(self, message: messages.Request) -> object:
        """Ask something, and give the first answer to its call."""
        self.channel.send(message)
        answer, descriptors = self.await_message(object, message.call)
        scm_rights.close_all(descriptors)
        return answer

    def quiet(self) -> bool:
        """Whether the broker has nothing to say, and lives: it answers a harmless question."""
        call = self.call()
        answer = self.ask(messages.Request(call=call, connection=2**40, body=messages.ListJobs()))
        return isinstance(answer, messages.Refused)

    def _let_go(self) -> None:
        self.channel.close()
        if self._reporter is not None:
            self._reporter.close()
            self._reporter = None


@contextlib.contextmanager
def started(daemon: Daemon, home: Path, *environment: str) -> Iterator[CompromisedFront]:
    """Start a daemon, and be its front. At the end both go, as they should."""
    front = CompromisedFront(home)
    with contextlib.closing(front):
        daemon.start(wrapper=(*front.wrapper, *environment))
        front.take_over()
        yield front
        daemon.signal(signal.SIGTERM)
        with contextlib.suppress(channel.Closed):
            front.await_message(messages.LocalRequest)
    assert daemon.wait() == 0
    daemon.await_none("")


@contextlib.contextmanager
def connected(daemon: Daemon, caller: Caller) -> Iterator[subprocess.Popen[bytes]]:
    """Somebody who connects, and says nothing."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    argv = [PYTHON, "-I", "-c", _CONNECT, str(daemon.socket)]
    with caller.popen(argv, **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def descriptors_of(pid: int) -> int:
    """How many descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))
