"""A fake daemon, and clients that call it: each a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

import pytest
from harness import waiting
from harness.callers import CONVERTCTL, Caller, Ran, make_reachable

HERE: Final = Path(__file__).parent

OF_ORDER: Final = frozenset({"caller", "init", "stop_at", "cancel_after", "cancel_at"})

ITSELF: Final = Caller(uid=os.getuid(), gid=os.getgid())


class Calling:
    """A client's process that makes one call."""

    def __init__(self, order: dict[str, Any], caller: Caller) -> None:
        self._said: list[dict[str, Any]] = []
        script = (HERE / "driver.py").read_text(encoding="utf-8")
        self.process = caller.popen(
            [sys.executable, "-I", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode())
        self.process.stdin.close()

    @property
    def _out(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def await_phase(self, phase: str) -> None:
        """Wait until the call is in a phase."""
        while (said := json.loads(self._out.readline())) != {"phase": phase}:
            assert "phase" in said, said

    def end(self) -> dict[str, Any]:
        """Wait for the call's end. A test that is over its time kills it."""
        with self.process, self._out:
            try:
                lines = self._out.read().splitlines()
            except BaseException:
                self.process.kill()
                raise
        end: dict[str, Any] = json.loads(lines[-1])
        return end


class Fake:
    """The fake daemon: its socket, its process while it runs, and what it noted."""

    def __init__(self, home: Path) -> None:
        self.socket = home / "fake.sock"
        self.log_path = home / "log"
        self.log_path.touch(mode=0o666)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> list[str]:
        """The calls that came, and how they ended."""
        lines = self.log_path.read_text().splitlines()
        return [line for line in lines if line != "serving"]

    def start(self, *, wait: bool = True) -> None:
        """Start it."""
        self.log_path.write_text("")
        script = str(HERE / "fake_daemon.py")
        argv = [sys.executable, "-I", script, str(self.socket), str(self.log_path)]
        self._process = subprocess.Popen(argv)
        if wait:
            serving = "serving"
            waiting.until(lambda: serving in self.log_path.read_text(), "the fake serves")

    def kill(self) -> None:
        """Kill it. Its socket stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def await_noted(self, line: str) -> None:
        """Wait until it noted something."""
        waiting.until(lambda: line in self.log, f"the fake noted {line!r}")

    # --- its callers -------------------------------------------------------------------------

    def calling(self, kind: str, method: str, *args: str, **order: Any) -> Calling:  # noqa: ANN401
        """Begin a call. An order has what driver.py knows, and `caller`, who makes it."""
        caller = order.pop("caller", ITSELF)
        init = {"socket": str(self.socket), **order.pop("init", {})}
        order = {"kind": kind, "method": method, "args": args, "options": {}, "init": init, **order}
        return Calling(order, caller)

    def call(self, kind: str, method: str, *args: str, **order: Any) -> dict[str, Any]:  # noqa: ANN401
        """Make a call, and give its end."""
        return self.calling(kind, method, *args, **order).end()

    def converting(self, kind: str, label: str = "", **options: Any) -> Calling:  # noqa: ANN401
        """Begin a conversion. Some of the options are the order's own."""
        order = {name: options.pop(name) for name in OF_ORDER & options.keys()}
        options = {"dest_format": "raw", "label": label, **options}
        return self.calling(kind, "convert", "/images/a", "/images/b", options=options, **order)

    def convert(self, kind: str, label: str = "", **options: Any) -> dict[str, Any]:  # noqa: ANN401
        """Make a conversion, and give its end."""
        return self.converting(kind, label, **options).end()

    def convertctl(self, *arguments: str) -> Ran:
        """Run convertctl."""
        return ITSELF.convertctl(self.socket, *arguments)

    def convertctl_started(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start convertctl."""
        return ITSELF.popen(
            [CONVERTCTL, *arguments],
            env={"CONVERTD_SOCKET": str(self.socket)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )


@pytest.fixture
def absent(tmp_path: Path) -> Iterator[Fake]:
    """A fake daemon that is not started yet."""
    make_reachable(tmp_path)
    fake = Fake(tmp_path)
    with contextlib.ExitStack() as undo:
        undo.callback(fake.kill)
        yield fake


@pytest.fixture
def fake(absent: Fake) -> Fake:
    """A fake daemon that serves."""
    absent.start()
    return absent


def interrupt(process: subprocess.Popen[bytes], number: signal.Signals) -> tuple[int, str, str]:
    """Signal a process; give its exit status and what it still said."""
    process.send_signal(number)
    out, err = process.communicate(timeout=waiting.DEADLINE_S)
    return process.returncode, out.decode(), err.decode()
