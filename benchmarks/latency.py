"""How soon the daemon answers: from a cold start, idle and busy."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from harness import callers as users
from harness import daemon as daemons
from harness import waiting
from harness.daemon import Daemon

from benchmarks import callers, results
from benchmarks.callers import JOBS, CallerProcess
from benchmarks.cases import Case
from benchmarks.settings import Settings

COLD_START: Final = "cold start"
IDLE: Final = "GetAccess, idle"
BUSY: Final = "GetAccess, all job slots busy"


def cold_start(images: Path, settings: Settings) -> results.Latency:
    """The first call to a socket that starts the daemon, as under systemd."""
    seconds = [_first_answer(callers.policy(images)) for _ in range(settings.starts)]
    return results.Latency(name=COLD_START, seconds=seconds)


def _first_answer(policy: str) -> float:
    with tempfile.TemporaryDirectory(prefix="convertd-bench-", dir="/run") as name:
        home = Path(name)
        home.chmod(0o755)
        socket, file, log = home / "socket", home / "policy.toml", home / "log"
        file.write_text(policy, encoding="utf-8")
        daemon = [str(daemons.COMMAND), "--policy", str(file), "--socket", str(socket)]
        # systemd-socket-activate(1) listens, and becomes the daemon at the first connection.
        argv = ["systemd-socket-activate", f"--listen={socket}", *daemon]
        with (
            callers.caller(socket) as caller,
            log.open("wb") as stderr,
            subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=stderr) as started,
        ):
            try:
                waiting.until(
                    lambda: b"Listening on" in log.read_bytes(), "systemd-socket-activate listens"
                )
                socket.chmod(0o666)
                return float(caller.call("first"))
            finally:
                started.terminate()


def access(
    daemon: Daemon, caller: CallerProcess, load: Case, settings: Settings
) -> list[results.Latency]:
    """GetAccess while the daemon is idle, and while each job slot has a conversion."""
    caller.call("access", settings.access_calls)
    idle = caller.call("access", settings.access_calls)
    with _occupied(daemon, load):
        busy = caller.call("access", settings.access_calls)
    daemon.await_none(daemons.QEMU_IMG)
    return [
        results.Latency(name=IDLE, seconds=idle),
        results.Latency(name=BUSY, seconds=busy),
    ]


@contextlib.contextmanager
def _occupied(daemon: Daemon, load: Case) -> Iterator[None]:
    """Keep all slots busy with another user's conversions."""
    dests = [load.source.path.with_name(f"busy-{number}") for number in range(JOBS)]
    calls = [callers.convert_call(load, dest) for dest in dests]
    for call in calls:
        call["options"]["overwrite"] = True
    try:
        with callers.caller(daemon.socket, users.BOB) as caller:
            caller.call("occupy", calls)
            waiting.until(lambda: caller.call("running") == JOBS, "all slots are taken")
            yield
    finally:
        for dest in dests:
            dest.unlink(missing_ok=True)
