"""The daemon's latency: from a cold start, idle and busy, and with many callers at once."""

from __future__ import annotations

import contextlib
import functools
import itertools
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from harness import callers, waiting
from harness import daemon as daemons
from harness.daemon import Daemon

from benchmarks import disk, measured, peers
from benchmarks.cases import Case
from benchmarks.peers import JOBS, Line
from benchmarks.settings import Settings

COLD_START: Final = "cold start"
IDLE: Final = "GetAccess, idle"
BUSY: Final = "GetAccess, every job slot busy"

PROCESSES: Final = 8
"""Callers are threads of so many processes, so that one Python is not the bottleneck."""


def cold_start(images: Path, xfs: Path, settings: Settings) -> measured.Answers:
    """The first call to a socket that starts the daemon, as under systemd."""
    seconds = [_first_answer(peers.policy(images, xfs)) for _ in range(settings.starts)]
    return measured.Answers(name=COLD_START, seconds=seconds)


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
            peers.caller(socket) as line,
            log.open("wb") as stderr,
            subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=stderr) as started,
        ):
            try:
                waiting.until(lambda: b"Listening on" in log.read_bytes(), "somebody listens")
                socket.chmod(0o666)
                return float(line.order("first"))
            finally:
                started.terminate()


def access(daemon: Daemon, line: Line, load: Case, settings: Settings) -> list[measured.Answers]:
    """GetAccess while the daemon is idle, and while each job slot has a conversion."""
    line.order("ask", settings.answers)
    idle = line.order("ask", settings.answers)
    with _occupied(daemon, load):
        busy = line.order("ask", settings.answers)
    daemon.await_none(daemons.QEMU_IMG)
    return [
        measured.Answers(name=IDLE, seconds=idle),
        measured.Answers(name=BUSY, seconds=busy),
    ]


@contextlib.contextmanager
def _occupied(daemon: Daemon, load: Case) -> Iterator[None]:
    """Keep all slots busy with another user's conversions."""
    calls = [
        peers.call(load, load.source.path.with_name(f"busy-{number}")) for number in range(JOBS)
    ]
    for call in calls:
        call["options"]["overwrite"] = True
    with peers.caller(daemon.socket, callers.BOB) as line:
        line.order("occupy", calls)
        waiting.until(lambda: line.order("running") == JOBS, "every slot is taken")
        yield
    for call in calls:
        Path(call["dest"]).unlink(missing_ok=True)


def crowds(
    daemon: Daemon, nova: Line, case: Case, argv: list[str], settings: Settings
) -> list[measured.Crowd]:
    """Small conversions by one caller, and by many at once; the same with qemu-img and Nova."""
    found = []
    for number in settings.callers:
        each = range(max(1, settings.calls // number))
        dests = [
            [case.source.path.with_name(f"crowd-{caller}-{one}") for one in each]
            for caller in range(number)
        ]
        for convert in (
            functools.partial(_by_convertd, daemon, case),
            functools.partial(_by_nova, nova, case),
            functools.partial(_by_qemu_img, argv),
        ):
            disk.settle(case.source.path.parent, settings.patience)
            found.append(convert(dests))
            for dest in itertools.chain(*dests):
                dest.unlink()
    return found


def _by_convertd(daemon: Daemon, case: Case, dests: list[list[Path]]) -> measured.Crowd:
    shares = [share for share in (dests[number::PROCESSES] for number in range(PROCESSES)) if share]
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(peers.caller(daemon.socket)) for _ in shares]
        for line in lines:
            line.order("ask", 1)
        for line, share in zip(lines, shares, strict=True):
            line.begin("crowd", [[peers.call(case, dest) for dest in row] for row in share])
        answers = [line.answer() for line in lines]
    seconds = [second for answer in answers for second in answer["seconds"]]
    begun, ended = zip(*(answer["span"] for answer in answers), strict=True)
    return measured.Crowd(
        contestant="convertd",
        callers=len(dests),
        seconds=seconds,
        total_s=max(ended) - min(begun),
    )


def _by_nova(nova: Line, case: Case, dests: list[list[Path]]) -> measured.Crowd:
    calls = [[peers.nova_call(case, dest) for dest in row] for row in dests]
    answer = nova.order("crowd", calls)
    begun, ended = answer["span"]
    return measured.Crowd(
        contestant="nova",
        callers=len(dests),
        seconds=answer["seconds"],
        total_s=ended - begun,
    )


def _by_qemu_img(argv: list[str], dests: list[list[Path]]) -> measured.Crowd:
    seconds: list[float] = []

    def work(row: list[Path]) -> None:
        seconds.extend(peers.run([[*argv[:-1], str(dest)]]).seconds for dest in row)

    crew = [threading.Thread(target=work, args=(row,)) for row in dests]
    began = time.monotonic()
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    return measured.Crowd(
        contestant="same argv",
        callers=len(dests),
        seconds=seconds,
        total_s=time.monotonic() - began,
    )
