"""Run granted requests: each waits, is done by a process, and ends or is ended."""

from __future__ import annotations

import logging
import signal
from typing import TYPE_CHECKING, Final

from convertd_core import conditions, messages, results
from convertd_daemon.broker import jobs, queue
from convertd_daemon.linux import children, getrandom

if TYPE_CHECKING:
    from convertd_core import values
    from convertd_daemon import channel
    from convertd_daemon.broker.connections import Connection
    from convertd_daemon.job.process import PreforkedJob
    from convertd_daemon.loop import Loop
    from convertd_daemon.service import audit
    from convertd_daemon.service.reporting import Reporter

log = logging.getLogger(__name__)

ENDING_S: Final = 5.0
"""How long a job may take to end after SIGTERM, and then after SIGKILL, before it counts as
unkillable."""


class JobSupervisor:
    """Starts the jobs of a table, in turn; ends each, and reports it for the audit record."""

    def __init__(
        self,
        loop: Loop,
        table: jobs.Jobs,
        spare: PreforkedJob,
        front: channel.Sender,
        reporter: Reporter,
    ) -> None:
        self._loop = loop
        self.jobs = table
        self._spare = spare
        self._front = front
        self._reporter = reporter
        self._is_draining = False
        queues = (table.conversions, table.inspections)
        self._positions = queue.Positions(loop, queues, self._send_position)

    # --- queue and start ------------------------------------------------------------------------

    def enqueue(
        self,
        call: int,
        connection: Connection,
        grant: values.Grant,
        asked: audit.RequestSummary,
    ) -> None:
        """Queue a granted request; it starts at once if a slot is free.

        Raises:
            conditions.QueueFull, conditions.DestBusy: as they say.
            conditions.BadMessage: the call has a job.
        """
        if self.jobs.by_call(call) is not None:
            raise conditions.BadMessage(problem="this call has a job already")
        job = self.jobs.add(call, connection, grant, asked)
        log.info(
            "granted job=%s uid=%d gid=%d pid=%d rule=%s source=%r dest=%r",
            job.job_id,
            grant.peer.uid,
            grant.peer.gid,
            grant.peer.pid,
            grant.rule,
            grant.request.source.path,
            asked.dest,
        )
        self.advance()

    def advance(self) -> None:
        """Start the jobs for which a slot is free, and send the others their positions."""
        for waiting in (self.jobs.conversions, self.jobs.inspections):
            while not self._is_draining and (job := waiting.next()) is not None:
                self._start(job)
        self.notify_positions()
        self._reporter.update_status()

    def notify_positions(self) -> None:
        """Send the callers of waiting jobs their positions."""
        self._positions.notify()

    def _send_position(self, job: jobs.Job) -> bool:
        """Send a caller its position; False, and later, while the front is behind."""
        if self._front.is_behind:
            return False
        self._reply(job, messages.Queued(job_id=job.job_id, position=job.position))
        return True

    def _start(self, job: jobs.Job) -> None:
        """Start a job's process, and send the front its end of the job's channel."""
        try:
            job_channel = job.start(self._spare)
        except OSError:
            error_id = getrandom.hex_name(6)
            log.exception("could not fork a job id=%s", error_id)
            failure = conditions.InternalError(error_id=error_id).failure()
            self._refuse(job, failure)
            return
        log.debug("started job=%s pid=%d", job.job_id, job.pid)
        descriptor = job_channel.sock.detach()
        self._reply(job, messages.Started(job_id=job.job_id), descriptor)
        self._spare.schedule_fork(len(self.jobs))
        duration_s = job.grant.limits.duration_seconds
        overdue = conditions.DurationExceeded(duration_s=duration_s)
        # The job minds its time itself; this is for one that can't, being stuck in the kernel.
        job.timer = self._loop.after(duration_s + ENDING_S, lambda: self.end(job, overdue))

    def _refuse(self, job: jobs.Job, failure: conditions.Failure) -> None:
        """End a job that has no process."""
        self._reporter.report(job.record(None, failure))
        self._reply(job, messages.Refused(failure=failure))
        self.jobs.remove(job)

    def _reply(
        self, job: jobs.Job, body: messages.ReplyBody, descriptor: int | None = None
    ) -> None:
        self._front.send(messages.Reply(call=job.call, body=body), descriptor)

    # --- events ---------------------------------------------------------------------------------

    def on_abandoned(self, call: int) -> None:
        """End the job of a call that the front no longer needs."""
        job = self.jobs.by_call(call)
        if job is not None:
            self.end(job, conditions.CancelledByCaller())

    def on_finished(self, call: int) -> None:
        """Free the destination of a job that has reported its end, before its process ends.

        A front that lies about this gains nothing: linkat(2) refuses a name that exists.
        """
        job = self.jobs.by_call(call)
        if job is not None:
            job.finished = True

    def on_disconnect(self, connection: Connection) -> None:
        """Cancel the jobs of a connection that is closed."""
        for job in self.jobs.by_connection(connection.number):
            self.end(job, conditions.CancelledByCaller())

    def on_front_exit(self) -> None:
        """Separate the jobs from the calls of a front that is gone."""
        for job in self.jobs:
            job.call = jobs.NO_CALL

    def drain(self) -> None:
        """Start no more jobs, and refuse those that wait."""
        self._is_draining = True
        self._spare.end()
        for job in self.jobs:
            if job.state is results.JobState.QUEUED:
                self.end(job, conditions.Stopping())

    def end_all(self) -> None:
        """End all jobs."""
        for job in self.jobs:
            self.end(job, conditions.Stopping())

    # --- end ------------------------------------------------------------------------------------

    def end(self, job: jobs.Job, why: conditions.ConvertError) -> None:
        """Refuse a job that waits; end one that runs, by SIGTERM, later by SIGKILL."""
        if self.jobs.find(job.job_id) is not job or job.ending is not None:
            return
        job.ending = why.failure()
        if job.is_writing_a_device:
            job.ending = job.ending.with_undefined(job.writes)
        if job.state is results.JobState.QUEUED:
            self._refuse(job, job.ending)
            self.advance()
            return
        job.state = results.JobState.CANCELLING
        job.signal(signal.SIGTERM)
        self._loop.after(ENDING_S, lambda: self._kill(job))

    def _kill(self, job: jobs.Job) -> None:
        if self.jobs.find(job.job_id) is job:
            job.signal(signal.SIGKILL)
            self._loop.after(ENDING_S, lambda: self._mark_unkillable(job))

    def _mark_unkillable(self, job: jobs.Job) -> None:
        """End the call of a process that SIGKILL does not end (state D). It keeps its slot."""
        if self.jobs.find(job.job_id) is job and job.ending is not None:
            pids = ",".join(str(pid) for pid in sorted(job.processes()))
            log.error("job can't be killed job=%s pids=%s", job.job_id, pids)
            job.state = results.JobState.UNKILLABLE
            self._front.send(messages.Ended(job_id=job.job_id, failure=job.ending))

    def on_exit(self, pid: int, status: int, others: frozenset[int]) -> None:
        """Handle the exit of a child that is none of `others`, which belong to no job."""
        job = self.jobs.by_pid(pid)
        if job is None:
            self._spare.on_exit(pid)
            return
        if pid == job.pid:
            # What it left to us, when it ended: children of ours that we did not start.
            own = self.jobs.processes() | others | {self._spare.pid}
            job.left = set(children.of_self() - own)
            self._on_job_exit(job, status)
        job.left.discard(pid)
        if not job.left:
            self.jobs.remove(job)
            self.advance()
            self._spare.schedule_fork(len(self.jobs))

    def _on_job_exit(self, job: jobs.Job, status: int) -> None:
        """End the call of a job whose process has ended. Processes that it left keep its slot."""
        failure = job.ending or _failure_without_outcome(job, status)
        outcome = job.outcome()
        cut = outcome is not None and not job.ending and not outcome.done and not outcome.reason
        # The front closed the job's channel before it told us why: its caller was gone.
        on_record = conditions.CancelledByCaller().failure() if cut else failure
        self._reporter.report(job.record(outcome, on_record))
        self._front.send(messages.Ended(job_id=job.job_id, failure=failure))
        job.pid = 0
        if job.left:
            job.ending = failure
            self._kill(job)


def _failure_without_outcome(job: jobs.Job, status: int) -> conditions.Failure:
    """The failure of a job that did not report one itself."""
    if status == -signal.SIGKILL:
        log.warning("job was killed job=%s pid=%d", job.job_id, job.pid)
        return conditions.OutOfMemory().failure()
    error_id = job.job_id
    if status != 0:
        log.error("job ended job=%s status=%d id=%s", job.job_id, status, error_id)
    return conditions.InternalError(error_id=error_id).failure()
