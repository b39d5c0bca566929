"""The process of a job, as the broker sees it: forked, perhaps before there is a job for it.

fork(2) takes milliseconds, and a process is slow at first, until it has its own copy of each page
that it writes to. So one process is forked in advance. It has no grant, no connection, and no
descriptor but the ends of its own channels. Each does one job and ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from convertd_core import codec, messages, values
from convertd_daemon import channel
from convertd_daemon.job import main as job_main
from convertd_daemon.job import outcome
from convertd_daemon.sandbox import forking

if TYPE_CHECKING:
    from collections.abc import Callable

    from convertd_daemon.loop import Loop, Timer
    from convertd_daemon.sandbox.setup import Setup

log = logging.getLogger(__name__)

FORK_AFTER_S: Final[tuple[float, ...]] = (0.0, 0.06, 0.02)
"""When the next spare is forked, by how many jobs there are: none, one, more. A small job that has
the machine to itself would be hindered, by a tenth of 36 ms (2 cores): it is let end first."""

MOST_GROUPS_SENT: Final = 4096
"""For a caller in more a process is forked that has them: to find that a message would be too long
takes a tenth of a second for 65,536, and others wait (measured 2026-11)."""


@dataclass(slots=True, kw_only=True, eq=False)
class JobProcess:
    """A forked process, which waits for its job or has it.

    Owns the broker's end of the channel for its assignment, the front's end of the job's channel,
    and the pipe on which the job reports its outcome.
    """

    pid: int
    assignments: channel.Channel
    channel: channel.Channel
    outcome_pipe: int

    def assign(self, job_id: str, grant: values.Grant) -> None:
        """Assign it a job.

        Raises:
            channel.Closed: it is gone.
            channel.TooLong: the grant can't be sent; nothing was.
        """
        self.assignments.send(messages.StartJob(job_id=job_id, grant=grant))
        self.assignments.close()

    def end(self) -> None:
        """Kill and reap one that has no job."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.close()

    def close(self) -> None:
        """Close what belongs to it."""
        self.assignments.close()
        self.channel.close()
        os.close(self.outcome_pipe)


def fork(setup: Setup, begun: messages.StartJob | None = None) -> JobProcess:
    """Fork a process, which waits for its job unless it gets one here.

    Raises:
        OSError: no process, or no descriptors, to be had.
    """
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        assignments, assignments_end = channel.Channel.pair()
        ours.enter_context(assignments)
        theirs.enter_context(assignments_end)
        job_channel, job_channel_end = channel.Channel.pair()
        ours.enter_context(job_channel)
        theirs.enter_context(job_channel_end)
        pipe, pipe_end = os.pipe()
        ours.callback(os.close, pipe)
        theirs.callback(os.close, pipe_end)
        reporter = outcome.OutcomeReporter(job_channel_end.sock, pipe_end)
        broker = os.getpid()
        pid = forking.fork(
            lambda: job_main.run_forked(begun, assignments_end, reporter, setup, broker),
            keep=(assignments_end.fileno(), *reporter.descriptors()),
        )
        ours.pop_all()
    return JobProcess(pid=pid, assignments=assignments, channel=job_channel, outcome_pipe=pipe)


class PreforkedJob:
    """At most one process, forked in advance."""

    def __init__(self, loop: Loop, setup: Setup, may_fork: Callable[[], bool]) -> None:
        """Begin with none. `may_fork` is asked before each fork."""
        # Made here once, and not in each process during a request.
        codec.decoder_of(messages.StartJob)
        self._loop = loop
        self._setup = setup
        self._may_fork = may_fork
        self._worker: JobProcess | None = None
        self._is_over = False
        self._timer: Timer | None = None

    @property
    def pid(self) -> int:
        """Its process; 0 if there is none."""
        return self._worker.pid if self._worker is not None else 0

    def schedule_fork(self, jobs: int) -> None:
        """Fork one soon, beside so many jobs; of two calls, the earlier time counts."""
        timer = self._loop.after(FORK_AFTER_S[min(jobs, len(FORK_AFTER_S) - 1)], self._fork)
        if self._timer is not None:
            timer, later = sorted((self._timer, timer))
            later.cancel()
        self._timer = timer

    def _fork(self) -> None:
        self._timer = None
        if self._worker is None and not self._is_over and self._may_fork():
            # Whoever comes next has a process forked in his own time, or hears why not.
            with contextlib.suppress(OSError):
                self._worker = fork(self._setup)

    def begin(self, job_id: str, grant: values.Grant) -> JobProcess:
        """Assign a job to the preforked process, or to a new one.

        Raises:
            OSError: no process, or no descriptors, to be had.
        """
        worker = None
        if len(grant.peer.groups) <= MOST_GROUPS_SENT:
            worker, self._worker = self._worker, None
        if worker is not None:
            try:
                worker.assign(job_id, grant)
            except (channel.Closed, channel.TooLong):
                worker.end()
            else:
                return worker
        worker = fork(self._setup, messages.StartJob(job_id=job_id, grant=grant))
        worker.assignments.close()
        return worker

    def end(self) -> None:
        """End the preforked process, and fork no more in advance."""
        self._is_over = True
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()

    def on_exit(self, pid: int) -> None:
        """Note that a process has ended, which may be the preforked one."""
        if self._worker is not None and self._worker.pid == pid:
            log.warning("the preforked process ended pid=%d", pid)
            self._worker.close()
            self._worker = None
