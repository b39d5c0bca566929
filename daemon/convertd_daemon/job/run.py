"""Run the conversion, and tell how far it is."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from typing import TYPE_CHECKING, Final

from convertd_daemon import channel, errors, model
from convertd_daemon.job import qemu_img, space
from convertd_daemon.kernel import clock_getcpuclockid
from convertd_daemon.sandbox import limits

if TYPE_CHECKING:
    from convertd_daemon.job.leash import Leash
    from convertd_daemon.job.paths import Source, Target
    from convertd_daemon.job.result import Result
    from convertd_daemon.sandbox.enter import Child

log = logging.getLogger(__name__)

PROGRESS: Final = re.compile(rb"\((\d{1,3}(?:\.\d+)?)/100%\)")

CPU_TICK_S: Final = 0.01
"""A program that used less processor time than this since the last look did nothing."""


def convert(
    grant: model.Grant,
    plan: model.Plan,
    source: Source,
    result: Result,
    target: Target,
    leash: Leash,
    worker: qemu_img.Worker,
) -> tuple[str, ...]:
    """Run the plan, and give the warnings that a successful qemu-img printed.

    Raises:
        errors.Stalled: nothing moved for the policy's `stall`.
        errors.NoSpace, errors.ReadFailed, errors.WriteFailed, errors.ConversionFailed, …: what
            qemu-img failed of.
    """
    reporter = Reporter(leash)
    watchdog = Watchdog(grant.limits.stall_s, result, reporter)
    bounds = limits.Limits(address_space_bytes=grant.limits.memory_bytes)
    try:
        outcome = qemu_img.run(
            worker,
            plan.argv,
            leash,
            read=(source.fd,),
            write=(result.fd,),
            bounds=bounds,
            listener=reporter.hear,
            watch=watchdog.look,
        )
    except errors.DeadlineExceeded as error:
        # A qemu-img in state D can't be killed: its caller is told before we wait for its end.
        leash.tell(channel.Failed(failure=error.failure()))
        raise
    if outcome.status != 0:
        log.warning(
            "convert failed path=%r status=%d said=%r",
            source.place.path,
            outcome.status,
            outcome.stderr,
        )
        raise _failure(outcome, plan, source, target)
    return tuple(line for line in outcome.stderr.splitlines() if line)


class Reporter:
    """Turns qemu-img's `(12.34/100%)` into progress, in steps of one per cent."""

    def __init__(self, leash: Leash) -> None:
        self.leash = leash
        self.percent = -1.0
        self._tail = b""

    def hear(self, data: bytes) -> None:
        """Take a piece of standard output: lines that end in a carriage return, cut anywhere."""
        *lines, tail = (self._tail + data).split(b"\r")
        self._tail = tail[-64:]
        for line in lines:
            match = PROGRESS.search(line)
            if match:
                self._report(min(float(match[1]), 100.0))

    @property
    def flushing(self) -> bool:
        """Whether all is converted: qemu-img says 100 % before it flushes."""
        return self.percent >= 100.0

    def _report(self, percent: float) -> None:
        if int(percent) <= int(self.percent):
            return
        self.percent = percent
        phase = model.Phase.FLUSHING if self.flushing else model.Phase.CONVERTING
        self.leash.progress(phase, percent)


class Watchdog:
    """Notices that nothing moves: no per cent, no block written, no processor time used."""

    def __init__(self, stall_s: float, result: Result, reporter: Reporter) -> None:
        self.stall_s = stall_s
        self.result = result
        self.reporter = reporter
        self._moved = time.monotonic()
        self._percent = -1.0
        self._blocks = 0
        self._cpu_s = 0.0

    def look(self, child: Child) -> None:
        """Compare with the last look. Flushing may take as long as the job may.

        Raises:
            errors.Stalled: nothing moved for the stall limit.
        """
        now = time.monotonic()
        if self._has_moved(child) or self.reporter.flushing:
            self._moved = now
        elif now - self._moved > self.stall_s:
            raise errors.Stalled(stall_s=self.stall_s)

    def _has_moved(self, child: Child) -> bool:
        percent, blocks = self.reporter.percent, os.fstat(self.result.fd).st_blocks
        try:
            cpu_s = clock_getcpuclockid.cpu_time_s(child.pid)
        except OSError:
            cpu_s = self._cpu_s
        moved = (
            percent != self._percent
            or blocks != self._blocks
            or cpu_s - self._cpu_s >= CPU_TICK_S
        )
        self._percent, self._blocks, self._cpu_s = percent, blocks, cpu_s
        return moved


def _failure(
    outcome: qemu_img.Outcome, plan: model.Plan, source: Source, target: Target
) -> errors.ConvertError:
    """Tell from what qemu-img printed, and how it ended, what went wrong.

    Its text decides nothing but which words the caller reads: the result is discarded anyway.
    """
    said, path = outcome.stderr.lower(), target.place.path
    if "no space left" in said:
        return space.no_space(target, plan.needed_bytes)
    if "quota exceeded" in said:
        return errors.QuotaExceeded(path=path)
    if 'failed to get "' in said and "lock" in said:
        return errors.ImageInUse(path=source.place.path)
    if outcome.status in _OUT_OF_MEMORY or "cannot allocate memory" in said:
        return errors.OutOfMemory()
    if outcome.status < 0:
        name = signal.Signals(-outcome.status).name
        return errors.ConversionFailed(path=source.place.path, problem=f"ended by {name}")
    if "compression type" in said or "unknown compression" in said:
        return errors.Unsupported(what="the compression type", why="this qemu-img lacks it")
    if "error while reading" in said:
        return errors.ReadFailed(path=source.place.path, problem=_strerror_in(outcome.stderr))
    if "error while writing" in said or "flush" in said:
        return errors.WriteFailed(path=path, problem=_strerror_in(outcome.stderr))
    problem = f"status {outcome.status}; the journal has its words"
    return errors.ConversionFailed(path=source.place.path, problem=problem)


_OUT_OF_MEMORY: Final = frozenset({-signal.SIGKILL, -signal.SIGABRT, -signal.SIGTRAP})
"""The kernel's OOM killer, and how glib ends a program that gets no memory."""


def _strerror_in(said: str) -> str:
    """The operating system's words at the end of a message of qemu-img's; never a file name."""
    last = said.rsplit(": ", 1)[-1].strip()
    return last if last in _STRERRORS else "the journal has qemu-img's words"


_STRERRORS: Final = frozenset(os.strerror(number) for number in range(1, 134))
