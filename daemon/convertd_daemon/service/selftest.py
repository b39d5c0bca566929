"""Convert 64 KiB in the sandbox before the daemon serves requests.

Runs in a child, as a job does, and by a job's code: the same rights, the same Landlock, the same
seccomp filter.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from convertd_core import conditions, messages, values
from convertd_daemon import channel
from convertd_daemon.job import context
from convertd_daemon.job.qemu import execution, plan
from convertd_daemon.sandbox import forking, limits
from convertd_daemon.service.preflight import StartError

if TYPE_CHECKING:
    from convertd_daemon.sandbox.setup import Setup

log = logging.getLogger(__name__)

SIZE_BYTES: Final = 64 * 1024
LIMIT_S: Final = 20.0
LIMITS: Final = dataclasses.replace(limits.CONVERT, niceness=0)
"""Callers may be waiting for the daemon to start, however busy the machine is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """What the self-test found out about the installed qemu-img."""

    qemu_version: str
    compressions: tuple[values.Compression, ...]
    formats: frozenset[str]


def run(setup: Setup, directory: str) -> SelfTest:
    """Convert in `directory`, which only needs to take files.

    Raises:
        StartError: the conversion failed; the message says why.
    """
    ours, theirs = channel.Channel.pair()
    broker = os.getpid()
    pid = forking.fork(
        lambda: _convert_in_child(setup, directory, theirs, broker), keep=(theirs.fileno(),)
    )
    theirs.close()
    with ours:
        ours.sock.settimeout(LIMIT_S)
        try:
            answer, _ = ours.receive(SelfTest, messages.Failed)
        except (channel.Closed, TimeoutError) as error:
            os.kill(pid, signal.SIGKILL)
            raise StartError("the self-test gave no answer; the lines above say more") from error
        finally:
            os.waitpid(pid, 0)
    if isinstance(answer, messages.Failed):
        raise StartError(f"the self-test failed: {answer.failure.message}")
    return SelfTest(
        qemu_version=answer.qemu_version,
        compressions=answer.compressions,
        formats=answer.formats,
    )


def _convert_in_child(
    setup: Setup, directory: str, job_channel: channel.Channel, broker: int
) -> None:
    forking.unblock_signals()
    forking.die_with(broker)
    try:
        with execution.opened(setup) as worker:
            runner = execution.Runner(worker, context.JobContext(job_channel, LIMIT_S))
            job_channel.send(_convert_all(runner, directory))
    except conditions.ConvertError as error:
        job_channel.send(messages.Failed(failure=error.failure()))


def _convert_all(runner: execution.Runner, directory: str) -> SelfTest:
    # Its first line has the version.
    output = runner.run(("qemu-img", "--help"), execution.Inodes(), LIMITS)
    _convert(runner, directory, values.Compression.ZLIB)
    compressions = [values.Compression.ZLIB]
    try:
        _convert(runner, directory, values.Compression.ZSTD)
        compressions += [values.Compression.ZSTD]
    except conditions.ConversionFailed:
        log.warning("this qemu-img has no zstd")
    return SelfTest(
        qemu_version=_version_in(output.stdout),
        compressions=tuple(compressions),
        formats=_formats_in(output.stdout),
    )


def _convert(runner: execution.Runner, directory: str, compression: values.Compression) -> None:
    """One conversion from one unnamed inode to another, the source readable by root alone."""
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    source, dest = os.open(directory, flags, 0o600), os.open(directory, flags, 0o600)
    try:
        os.ftruncate(source, SIZE_BYTES)
        os.pwrite(source, os.urandom(SIZE_BYTES // 2), 0)
        identity = runner.worker.setup.identity
        if identity is not None:
            os.fchown(dest, -1, identity.gid)
            os.fchmod(dest, 0o060)
        argv = ("qemu-img", "convert", "-c", "-O", "qcow2", "-o", f"compression_type={compression}")
        outcome = runner.run(
            (*argv, plan.graph((plan.Node(format="raw", fd=source),)), plan.path_of(dest)),
            execution.Inodes(read=(source,), write=(dest,)),
            LIMITS,
        )
        if outcome.status != 0 or os.fstat(dest).st_size <= SIZE_BYTES // 2:
            problem = outcome.stderr or f"status {outcome.status}"
            raise conditions.ConversionFailed(path=directory, problem=problem)
    finally:
        os.close(source)
        os.close(dest)


def _version_in(output: bytes) -> str:
    """The version in the first line of `qemu-img --help`, or that line as it is."""
    line = output.decode("utf-8", "replace").partition("\n")[0]
    match = re.search(r"version (\S+)", line)
    return match[1] if match else line


def _formats_in(output: bytes) -> frozenset[str]:
    """The formats of ours in the list that `qemu-img --help` ends with.

    Raises:
        conditions.Unsupported: there is no such list, or none of ours is in it.
    """
    match = re.search(rb"^Supported formats:(.*)$", output, re.MULTILINE)
    listed = match[1].decode("utf-8", "replace").split() if match else []
    formats = values.FORMATS.intersection(listed)
    if not formats:
        why = "qemu-img --help lists no format that convertd knows"
        raise conditions.Unsupported(what="conversion", why=why)
    return formats
