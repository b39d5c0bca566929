"""Run the conversion, and report its progress."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import signal
import time
from typing import TYPE_CHECKING, Final

from convertd_core import conditions, results, values
from convertd_daemon.job import progress, secrets, stages
from convertd_daemon.job.files import write_behind
from convertd_daemon.job.qemu import execution, reasons
from convertd_daemon.job.qemu import plan as plans
from convertd_daemon.linux import clock_getcpuclockid
from convertd_daemon.sandbox import limits

if TYPE_CHECKING:
    from collections.abc import Callable

    from convertd_daemon.job.context import JobContext
    from convertd_daemon.job.endpoints import Endpoints
    from convertd_daemon.sandbox.spawn import ConfinedProgram

log = logging.getLogger(__name__)

PROGRESS: Final = re.compile(rb"\((\d{1,3}(?:\.\d+)?)/100%\)")

LONGEST_LINE: Final = 64
MAX_WARNINGS: Final = 16
MAX_WARNING_CHARACTERS: Final = 512

CREATING: Final = "error while converting"
"""How qemu-img begins what it says of a result that it could not create."""

NOT_MEASURED: Final = "unable to get accurate cpu usage"
"""Its message when it could not measure how long one try of a LUKS passphrase takes. It compares
its CPU time before and after a try; on a busy machine, above all a virtual one, that may not
advance. So qemu-img is started again, and creates the result again. Source: qemu
crypto/pbkdf.c."""

ATTEMPTS: Final = 5
"""The most starts. Each may fail by chance, before it writes any of the guest's data."""

IN_USE: Final = ('failed to get "', 'failed to get shared "')
WRONG_SECRET: Final = ("invalid password", "cannot unlock")
"""What qemu-img says, in lower case, of an image that is locked in one way or the other."""

CPU_TICK_S: Final = 0.01
"""A program that used less processor time than this since the last tick did nothing."""


def convert(
    grant: values.ConvertGrant,
    plan: stages.ConversionPlan,
    ends: Endpoints,
    kept: secrets.Secrets,
    runner: execution.Runner,
) -> tuple[results.Warning, ...]:
    """Run the plan's command, and give the warnings that a successful qemu-img printed.

    Raises:
        conditions.Stalled: nothing moved for the policy's `stall`.
        conditions.NoSpace, conditions.ReadFailed, conditions.WriteFailed,
            conditions.ConversionFailed, …: what qemu-img failed of.
    """
    outcome = _run(grant, plan, ends, kept, runner)
    for _ in range(ATTEMPTS - 1):
        if grant.request.dest.encryption is None or not _could_not_measure(outcome, plan):
            break
        outcome = _run(grant, plan, ends, kept, runner)
    if outcome.status != 0:
        log.warning(
            "convert failed path=%r status=%d stderr=%r",
            ends.source.place.path,
            outcome.status,
            outcome.excerpt,
        )
        raise failure_of(outcome, plan, ends)
    return tuple(
        results.Warning(reason="QEMU_IMG", message=line[:MAX_WARNING_CHARACTERS])
        for line in outcome.stderr.splitlines()[:MAX_WARNINGS]
        if line
    )


def _run(
    grant: values.ConvertGrant,
    plan: stages.ConversionPlan,
    ends: Endpoints,
    kept: secrets.Secrets,
    runner: execution.Runner,
) -> execution.Outcome:
    bounds = limits.Limits(address_space_bytes=grant.limits.memory_bytes)
    observer = Observer(runner.context, ends.dest.fd, grant.limits.stall_seconds)
    with secrets.as_pipes(kept, runner.worker.setup.identity) as pipes:
        argv = plans.with_secrets(plan.argv, pipes)
        inodes = ends.inodes(tuple(pipes.values()))
        with _writing_behind(plan, ends):
            return runner.run(argv, inodes, bounds, observer)


def _writing_behind(
    plan: stages.ConversionPlan, ends: Endpoints
) -> contextlib.AbstractContextManager[None]:
    """Keep the result from filling the page cache; a small one can't."""
    read_bytes = sum(member.actual_size_bytes for member in plan.chain)
    if plan.write_behind and max(read_bytes, plan.needed_bytes) >= write_behind.LEAST_BYTES:
        return write_behind.running(ends.dest.fd)
    return contextlib.nullcontext()


def _could_not_measure(outcome: execution.Outcome, plan: stages.ConversionPlan) -> bool:
    """Whether qemu-img failed to measure its CPU time, and so wrote none of the guest's data."""
    end = f"{CREATING} {plan.dest_format}: {NOT_MEASURED}"
    return outcome.status == 1 and outcome.stderr.lower().endswith(end)


class Observer:
    """Follows a conversion: turns qemu-img's `(12.34/100%)` into progress, and notices a stall.

    A conversion stalls when nothing moves: no output, no block of the result, no processor time.
    Flushing may take as long as the job may.
    """

    def __init__(self, context: JobContext, result: int, stall_s: float) -> None:
        """Follow what is written to the descriptor `result`."""
        self.context = context
        self.result = result
        self.stall_s = stall_s
        self._reporter = progress.PercentReporter(context)
        self._tail = b""
        self._moved = time.monotonic()
        self._output_bytes = 0
        self._seen: tuple[int, int, float] = (0, 0, 0.0)

    def on_output(self, data: bytes) -> None:
        """Take a piece of standard output. Until we do, the program may have to wait."""
        self._output_bytes += len(data)
        self.read(data)

    def on_error_output(self, data: bytes) -> None:
        """Take a piece of standard error, which is kept as a whole elsewhere."""
        self._output_bytes += len(data)

    def read(self, data: bytes) -> None:
        """Understand a piece of it: lines that end in a carriage return, cut anywhere."""
        *lines, tail = (self._tail + data).split(b"\r")
        self._tail = tail[-LONGEST_LINE:]
        for line in lines:
            match = PROGRESS.search(line)
            if match:
                # qemu-img says 100 % before it flushes.
                self._reporter.report(min(float(match[1]), progress.ALL))

    def on_tick(self, child: ConfinedProgram) -> None:
        """Compare with the last tick.

        Raises:
            conditions.Stalled: nothing moved for the stall limit.
        """
        now = time.monotonic()
        if self._has_moved(child) or self._reporter.percent >= progress.ALL:
            self._moved = now
        elif now - self._moved > self.stall_s:
            raise conditions.Stalled(stall_s=self.stall_s)

    def _has_moved(self, child: ConfinedProgram) -> bool:
        output_bytes, blocks, cpu_s = self._seen
        try:
            cpu_now_s = clock_getcpuclockid.cpu_time_s(child.pid)
        except OSError:
            cpu_now_s = cpu_s  # it has ended, and is about to be noticed
        blocks_now = blocks
        with contextlib.suppress(OSError):  # a file system that was shut down; qemu-img will say so
            blocks_now = os.fstat(self.result).st_blocks
        self._seen = (self._output_bytes, blocks_now, cpu_now_s)
        return self._seen[:2] != (output_bytes, blocks) or cpu_now_s - cpu_s >= CPU_TICK_S


def failure_of(
    outcome: execution.Outcome, plan: stages.ConversionPlan, ends: Endpoints
) -> conditions.ConvertError:
    """Tell from what qemu-img printed, and how it ended, what went wrong.

    Its text decides nothing but which words the caller reads: the result is discarded anyway.
    """
    for phrases, condition in _CONDITIONS:
        if any(phrase in outcome.stderr.lower() for phrase in phrases):
            return condition(outcome, plan, ends)
    path = ends.source.place.path
    if outcome.status in _OUT_OF_MEMORY:
        return conditions.OutOfMemory()
    if outcome.status < 0:
        name = signal.Signals(-outcome.status).name
        return conditions.ConversionFailed(path=path, problem=f"ended by {name}")
    problem = strerror_in(outcome.stderr, ends.source.place)
    if CREATING in outcome.stderr.lower() and problem in _WRITE_PROBLEMS:
        # The header, or the size: the first things that are written.
        return conditions.WriteFailed(path=ends.dest.place.path, problem=problem)
    problem = f"status {outcome.status}; {reasons.unknown(outcome.stderr, ends.source.place)}"
    return conditions.ConversionFailed(path=path, problem=problem)


_CONDITIONS: Final[
    tuple[
        tuple[
            tuple[str, ...],
            Callable[
                [execution.Outcome, stages.ConversionPlan, Endpoints], conditions.ConvertError
            ],
        ],
        ...,
    ]
] = (
    (
        ("no space left",),
        lambda _, plan, ends: ends.dest.no_space(plan.needed_bytes),
    ),
    (
        ("quota exceeded",),
        lambda _, _plan, ends: conditions.QuotaExceeded(path=ends.dest.place.path),
    ),
    (
        IN_USE,
        lambda _, _plan, ends: conditions.ImageInUse(path=ends.source.place.path),
    ),
    (
        WRONG_SECRET,
        lambda _, _plan, ends: conditions.WrongSecret(path=ends.source.place.path),
    ),
    (("cannot allocate memory", "could not allocate"), lambda *_: conditions.OutOfMemory()),
    (
        (NOT_MEASURED,),
        lambda _, _plan, ends: conditions.ConversionFailed(
            path=ends.source.place.path,
            problem="it could not measure its CPU time, which encryption needs;"
            " try again when the machine is less busy",
        ),
    ),
    (
        ("compression type", "unknown compression"),
        lambda *_: conditions.Unsupported(
            what="the compression type", why="this qemu-img lacks it"
        ),
    ),
    (
        ("module is missing",),
        lambda outcome, *_: conditions.Unsupported(
            what=f"compression by {reasons.missing_module(outcome.stderr) or 'a module'}",
            why="this qemu-img lacks the module for it",
        ),
    ),
    (
        ("error while reading",),
        lambda outcome, _, ends: conditions.ReadFailed(
            path=ends.source.place.path, problem=strerror_in(outcome.stderr, ends.source.place)
        ),
    ),
    (
        ("error while writing", "flush"),
        lambda outcome, _, ends: conditions.WriteFailed(
            path=ends.dest.place.path, problem=strerror_in(outcome.stderr, ends.dest.place)
        ),
    ),
)
"""What qemu-img prints, in lower case, and what that means. The first that fits counts."""


_OUT_OF_MEMORY: Final = frozenset({-signal.SIGKILL, -signal.SIGABRT, -signal.SIGTRAP})
"""The kernel's OOM killer, and how glib ends a program that gets no memory."""


def strerror_in(text: str, place: values.Place) -> str:
    """The operating system's words at the end of a message of qemu-img's; never a file name."""
    last = text.rsplit(": ", 1)[-1].strip()
    return last if last in _STRERRORS else reasons.unknown(text, place)


_WRITE_PROBLEMS: Final = frozenset(
    os.strerror(number)
    for number in (errno.EIO, errno.EROFS, errno.EFBIG, errno.ENODEV, errno.EREMOTEIO, errno.ESTALE)
)
"""What is the disk's fault; not EINVAL, which a bad option gets as well."""

_STRERRORS: Final = frozenset(
    os.strerror(number)
    for number in (
        *(errno.EIO, errno.ENODATA, errno.EILSEQ, errno.EUCLEAN, errno.EBADMSG, errno.EINVAL),
        *(errno.EREMOTEIO, errno.ETIMEDOUT, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        *(errno.EROFS, errno.ENOMEDIUM, errno.EBUSY, errno.ENODEV),
    )
)
"""What a device or a file system says of data. Not what open(2) says of a name: an image can have
qemu-img open any name, and the answer would tell whether the file exists."""
