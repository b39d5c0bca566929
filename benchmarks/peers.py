"""Contestants that are more than a command line, and the protocol of all contestants."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from harness.callers import ALICE, PYTHON, Caller
from harness.daemon import Daemon

from benchmarks import contestants, usage
from benchmarks.cases import Case
from convertd_daemon.sandbox import preforked

ROOT: Final = Path(__file__).parents[1]
NOVA: Final = ROOT / "build/nova/bin/python"
NOVA_CALLER: Final = ROOT / "benchmarks/nova_caller.py"
CALLER: Final = (ROOT / "benchmarks/caller.py").read_text(encoding="utf-8")

POLICY: Final = """
[limits]
jobs = {jobs}
jobs_per_user = {jobs}
queue = 1000
queue_per_user = 1000
[roots.images]
path = "{images}"
access = "daemon"
[roots.xfs]
path = "{xfs}"
access = "daemon"
[[grants]]
users = [1234, 1235]
read = ["images", "xfs"]
write = ["images", "xfs"]
"""

JOBS: Final = 4
"""Conversions at once, as by default."""

RAN: Final = re.compile(r"run command=(qemu-img convert .*)$", re.MULTILINE)
"""The daemon's debug message about a qemu-img that it runs."""


class Failed(Exception):
    """A contestant or the daemon failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Took:
    """The cost of one conversion. `cpu_s` is the CPU time of all its processes."""

    seconds: float
    cpu_s: float


class Racer(Protocol):
    """A contestant."""

    @property
    def name(self) -> str:
        """A name for tables."""

    @property
    def what(self) -> str:
        """Its description, in a sentence."""

    @property
    def copies(self) -> bool:
        """Whether its result is to be compared with the source."""

    def enters(self, case: Case) -> bool:
        """Whether it takes part in a case."""

    def convert(self, case: Case, dest: Path) -> Took:
        """Convert. `dest` does not exist."""


class CommandLine:
    """Commands that this process runs one after the other."""

    copies = True

    def __init__(self, name: str, commands: contestants.Contestant) -> None:
        self.name = name
        self.what = " ".join((commands.__doc__ or "").split())
        self._commands = commands

    def enters(self, case: Case) -> bool:
        """See Racer."""
        return self._commands(case, Path("/dest")) is not None

    def convert(self, case: Case, dest: Path) -> Took:
        """See Racer."""
        return run(self._commands(case, dest) or [])


def run(commands: Sequence[Sequence[str]]) -> Took:
    """Run commands one after the other.

    Raises:
        Failed: one exited with a status other than 0.
    """
    cpu_s = 0.0
    began = time.monotonic()
    for argv in commands:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=preforked.ENVIRONMENT,
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        cpu_s += used.ru_utime + used.ru_stime
        if process.returncode:
            raise Failed(f"{argv} ended with {process.returncode}")
    return Took(seconds=time.monotonic() - began, cpu_s=cpu_s)


class SameArgv:
    """qemu-img alone, with convertd's arguments: the difference is convertd's own cost."""

    name = "same argv"
    what = "qemu-img alone, with the arguments that convertd gives it, as it logs them at debug."
    copies = True

    def __init__(self, argv: Mapping[str, list[str]]) -> None:
        self._argv = argv

    def enters(self, case: Case) -> bool:
        """See Racer."""
        return bool(self._argv[case.name])

    def convert(self, case: Case, dest: Path) -> Took:
        """See Racer."""
        return run([[*self._argv[case.name][:-1], str(dest)]])


class Line:
    """A process that executes commands, each a line of JSON, and replies with another."""

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        self.process = process
        self.name = name

    def order(self, *order: object) -> Any:  # noqa: ANN401 - JSON is anything
        """Send a command, and wait for the reply."""
        self.begin(*order)
        return self.answer()

    def begin(self, *order: object) -> None:
        """Send a command."""
        assert self.process.stdin is not None  # noqa: S101 - for mypy
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> Any:  # noqa: ANN401 - JSON is anything
        """Wait for the reply.

        Raises:
            Failed: the process ended instead; its standard error says why.
        """
        assert self.process.stdout is not None  # noqa: S101 - for mypy
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"{self.name} ended")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        with self.process:
            pass


@contextlib.contextmanager
def caller(socket: Path, who: Caller = ALICE) -> Iterator[Line]:
    """A user's process that calls the daemon through convertd_client.Client."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    argv = [PYTHON, "-I", "-c", CALLER, str(socket)]
    line = Line(who.popen(argv, **pipes), f"caller of uid {who.uid}")
    try:
        yield line
    finally:
        line.close()


def call(case: Case, dest: Path) -> dict[str, Any]:
    """A conversion in the form of caller.py's commands."""
    options = {"dest_format": case.dest_format, "compression": case.compression or None}
    if not case.undeclared:
        options["source_format"] = case.source.format
    return {"source": str(case.source.path), "dest": str(dest), "options": options}


class Convertd:
    """The daemon, called over one connection by an unprivileged user."""

    name = "convertd"
    what = "The daemon, called through `convertd_client.Client` by a user without rights."
    copies = True

    def __init__(self, daemon: Daemon, line: Line) -> None:
        self._daemon = daemon
        self._line = line

    def enters(self, case: Case) -> bool:
        """See Racer."""
        del case
        return True

    def convert(self, case: Case, dest: Path) -> Took:
        """See Racer."""
        before = usage.cpu_s(self._daemon.pid)
        seconds = self._line.order("convert", call(case, dest))
        self._daemon.await_none("qemu-img")
        return Took(seconds=seconds, cpu_s=usage.cpu_s(self._daemon.pid) - before)


class Nova:
    """Nova's own function, run by oslo.privsep's helper."""

    name = "nova"
    what = (
        "Nova 34's own `nova.privsep.qemu.convert_image`, called by a user without rights and run "
        "by oslo.privsep's helper, which is root."
    )
    copies = True

    def __init__(self, line: Line) -> None:
        self.line = line

    def enters(self, case: Case) -> bool:
        """See Racer."""
        return case.compression != "zstd"

    def convert(self, case: Case, dest: Path) -> Took:
        """See Racer."""
        before = usage.cpu_s(self.line.process.pid)
        seconds = self.line.order("convert", nova_call(case, dest))
        return Took(seconds=seconds, cpu_s=usage.cpu_s(self.line.process.pid) - before)


def nova_call(case: Case, dest: Path) -> list[object]:
    """The arguments of Nova's convert_image."""
    source_format = None if case.undeclared else case.source.format
    paths = [str(case.source.path), str(dest)]
    return [*paths, source_format, case.dest_format, str(dest.parent), bool(case.compression)]


@contextlib.contextmanager
def nova_caller() -> Iterator[Line]:
    """A process with Nova, and its privileged helper."""
    process = subprocess.Popen(
        [NOVA, "-W", "ignore", NOVA_CALLER, str(ALICE.uid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=preforked.ENVIRONMENT,
        start_new_session=True,
    )
    line = Line(process, "caller of Nova")
    try:
        yield line
    finally:
        line.close()


@contextlib.contextmanager
def daemon(images: Path, xfs: Path, *options: str) -> Iterator[Daemon]:
    """A daemon that may convert in two directories."""
    one = Daemon(policy(images, xfs))
    try:
        one.start(options=options)
        yield one
        one.stop()
    finally:
        one.discard()


def policy(images: Path, xfs: Path) -> str:
    """The text of the daemon's policy."""
    return POLICY.format(jobs=JOBS, images=images, xfs=xfs)


def what_it_runs(verbose: Daemon, line: Line, case: Case, dest: Path) -> list[str]:
    """Convert once, and return qemu-img's arguments, with paths instead of descriptors.

    Empty if the daemon ran no `qemu-img convert`.
    """
    before = len(verbose.log)
    line.order("convert", call(case, dest))
    found = RAN.findall(verbose.log[before:])
    if not found:
        return []
    *argv, graph, _ = shlex.split(found[-1])
    source = re.sub(r"/proc/self/fd/\d+", lambda _: str(case.source.path), graph)
    return [*argv, source, "DEST"]
