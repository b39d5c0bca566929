"""Processes of users that call convertd or Nova, and the daemon that they call."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from harness.callers import ALICE, PYTHON, Caller
from harness.daemon import Daemon

from benchmarks.cases import Case
from benchmarks.command_lines import ENVIRONMENT, Failed

ROOT: Final = Path(__file__).parents[1]
NOVA: Final = ROOT / "build/nova/bin/python"
NOVA_SCRIPT: Final = ROOT / "benchmarks/nova_script.py"
CALLER_SCRIPT: Final = (ROOT / "benchmarks/caller_script.py").read_text(encoding="utf-8")

POLICY: Final = """
[limits]
jobs = {jobs}
jobs_per_user = {jobs}
queue = 1000
queue_per_user = 1000
[roots.images]
path = "{images}"
access = "daemon"
[[grants]]
users = [1234, 1235]
read = ["images"]
write = ["images"]
"""

JOBS: Final = 4
"""Conversions at once, as by default."""


class CallerProcess:
    """A process that executes commands, each a line of JSON, and replies with another."""

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        self.process = process
        self.name = name

    def call(self, command: str, *arguments: object) -> Any:  # noqa: ANN401 - JSON is anything
        """Send a command, and wait for the reply.

        Raises:
            Failed: the process ended instead; its standard error says why.
        """
        self.send(command, *arguments)
        return self.reply()

    def send(self, command: str, *arguments: object) -> None:
        """Send a command.

        Raises:
            Failed: the process has ended.
        """
        assert self.process.stdin is not None  # noqa: S101 - for mypy
        try:
            self.process.stdin.write(json.dumps([command, *arguments]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Failed(f"{self.name} ended") from None

    def reply(self) -> Any:  # noqa: ANN401 - JSON is anything
        """Wait for the reply.

        Raises:
            Failed: the command failed, or the process ended; its standard error says why.
        """
        assert self.process.stdout is not None  # noqa: S101 - for mypy
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"{self.name} ended")
        value, error = json.loads(line)
        if error:
            raise Failed(f"{self.name}: {error}")
        return value

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError), self.process:
            pass


@contextlib.contextmanager
def caller(socket: Path, who: Caller = ALICE) -> Iterator[CallerProcess]:
    """A user's process that calls the daemon through convertd_client.Client."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    argv = [PYTHON, "-I", "-c", CALLER_SCRIPT, str(socket)]
    process = CallerProcess(who.popen(argv, **pipes), f"caller of uid {who.uid}")
    try:
        yield process
    finally:
        process.close()


def convert_call(case: Case, dest: Path, reflink: str = "auto") -> dict[str, Any]:
    """A conversion in the form of caller_script.py's commands."""
    options = {
        "dest_format": case.row.dest_format,
        "compression": case.row.compression or None,
        "reflink": reflink,
    }
    if not case.row.undeclared:
        options["source_format"] = case.source.format
    return {"source": str(case.source.path), "dest": str(dest), "options": options}


@contextlib.contextmanager
def nova_caller() -> Iterator[CallerProcess]:
    """A process with Nova, and its privileged helper."""
    started = subprocess.Popen(
        [NOVA, "-W", "ignore", NOVA_SCRIPT, str(ALICE.uid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    process = CallerProcess(started, "caller of Nova")
    try:
        yield process
    finally:
        process.close()


def nova_call(case: Case, dest: Path) -> list[object]:
    """The arguments of Nova's convert_image."""
    source_format = None if case.row.undeclared else case.source.format
    paths = [str(case.source.path), str(dest)]
    return [
        *paths,
        source_format,
        case.row.dest_format,
        str(dest.parent),
        bool(case.row.compression),
    ]


@contextlib.contextmanager
def daemon(images: Path, *options: str) -> Iterator[Daemon]:
    """A daemon that may convert in a directory.

    Raises:
        AssertionError: when it is stopped, something of it is left.
    """
    one = Daemon(policy(images))
    try:
        one.start(options=options)
        yield one
        one.stop()
    finally:
        one.discard()


def policy(images: Path) -> str:
    """The text of the daemon's policy."""
    return POLICY.format(jobs=JOBS, images=images)
