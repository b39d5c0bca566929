"""The broker's table of jobs: each with its caller, its request and its process."""

from __future__ import annotations

import dataclasses
import datetime
import os
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from convertd_core import codec, conditions, messages, results, values
from convertd_daemon import channel
from convertd_daemon.broker import queue
from convertd_daemon.linux import getrandom
from convertd_daemon.service import audit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convertd_daemon import loop
    from convertd_daemon.broker.connections import Connection
    from convertd_daemon.job.process import PreforkedJob

NO_CALL: Final = 0
"""The call of a job whose front is gone: a front's calls begin with 1."""


def now() -> datetime.datetime:
    """The time by the system clock."""
    return datetime.datetime.now(datetime.UTC)


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One request that was granted, until its process is gone, and what that left behind.

    `left` are the processes that its own left to us when it ended: a qemu-img that can't be killed,
    because storage does not answer, and that may still write when it does.
    """

    job_id: str
    call: int
    connection: Connection
    asked: audit.RequestSummary
    grant: values.Grant
    queue: queue.JobQueue[Job]
    order: int = 0
    queued: datetime.datetime = field(default_factory=now)
    state: results.JobState = results.JobState.QUEUED
    position: int = 0
    sent_position: int = 0
    pid: int = 0
    started: datetime.datetime | None = None
    finished: bool = False
    ending: conditions.Failure | None = None
    timer: loop.Timer | None = None
    left: set[int] = field(default_factory=set)
    _pipe: int = -1

    @property
    def is_writing_a_device(self) -> bool:
        """Whether it has begun, or may have begun, to overwrite a device."""
        on_device = isinstance(self.grant, values.ConvertGrant) and (
            self.grant.dest.root.kind is values.RootKind.BLOCK
        )
        return on_device and bool(self.writes) and self.state is not results.JobState.QUEUED

    @property
    def uid(self) -> int:
        """The caller."""
        return self.grant.peer.uid

    @property
    def writes(self) -> str:
        """The path of the destination that it may yet publish; empty if none."""
        if self.finished:
            return ""
        if isinstance(self.grant, values.ConvertGrant) and not self.grant.request.validate_only:
            return self.grant.dest.path
        return ""

    def start(self, spare: PreforkedJob) -> channel.Channel:
        """Start the job's process, and return the front's end of its channel.

        Raises:
            OSError: no process, or no descriptors, to be had; or the connection is over.
        """
        grant = dataclasses.replace(self.grant, peer=self.connection.peer())
        worker = spare.begin(self.job_id, grant)
        self.pid, self._pipe = worker.pid, worker.outcome_pipe
        self.state, self.started = results.JobState.RUNNING, now()
        return worker.channel

    def record(
        self, outcome: messages.JobOutcome | None, failure: conditions.Failure
    ) -> audit.Record:
        """The audit record of its end: as it reported it, or as the broker saw it."""
        found = outcome or audit.UNKNOWN
        cut = not found.done and not found.reason
        ended = now()
        begun = self.started or ended
        return audit.Record(
            asked=dataclasses.replace(self.asked, job_id=self.job_id),
            outcome=audit.Outcome.DONE if found.done else audit.Outcome.FAILED,
            reason=failure.reason if cut else found.reason,
            detail=failure.message if cut else found.detail,
            rule=self.grant.rule,
            found=found,
            queued_s=(begun - self.queued).total_seconds(),
            seconds=(ended - begun).total_seconds() if self.started else None,
        )

    def outcome(self) -> messages.JobOutcome | None:
        """What the process, which has ended, reported of its end; None if it reported nothing."""
        os.set_blocking(self._pipe, False)
        try:
            return codec.decode(os.read(self._pipe, channel.MAX_MESSAGE_BYTES), messages.JobOutcome)
        except (BlockingIOError, codec.CodecError):
            return None

    def close(self) -> None:
        """Close what belongs to the job."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    def signal(self, number: signal.Signals) -> None:
        """Signal its processes: our children, not reaped, so no other process has their pids."""
        for pid in self.processes():
            os.kill(pid, number)

    def processes(self) -> frozenset[int]:
        """Its processes that are our children."""
        return frozenset(self.left or ({self.pid} if self.pid else ()))


class Jobs:
    """All jobs, and the two queues in which they wait.

    Conversions wait in one, inspections (Inspect, validate_only) in the other: so they never wait
    behind a conversion.
    """

    def __init__(self, limits: values.Limits) -> None:
        self.conversions: queue.JobQueue[Job] = queue.JobQueue(queue.conversion_bounds(limits))
        self.inspections: queue.JobQueue[Job] = queue.JobQueue(queue.inspection_bounds(limits))
        self._by_id: dict[str, Job] = {}
        self._last_order = 0

    def set_limits(self, limits: values.Limits) -> None:
        """Take the bounds of a policy that was reloaded."""
        self.conversions.bounds = queue.conversion_bounds(limits)
        self.inspections.bounds = queue.inspection_bounds(limits)

    def __iter__(self) -> Iterator[Job]:
        return iter(tuple(self._by_id.values()))

    def __len__(self) -> int:
        return len(self._by_id)

    def add(
        self,
        call: int,
        connection: Connection,
        grant: values.Grant,
        asked: audit.RequestSummary,
    ) -> Job:
        """Put a granted request in its queue, without the caller's groups: see `start`.

        Raises:
            conditions.QueueFull: too many wait.
            conditions.DestBusy: another job of the same user is about to publish that destination,
                or publishing it. Between users the kernel alone answers (linkat(2), O_EXCL of a
                device): a name in a queue proves no right to it, and is nobody else's to know.
        """
        is_inspection = isinstance(grant, values.InspectGrant) or grant.request.validate_only
        its_queue = self.inspections if is_inspection else self.conversions
        job = Job(
            job_id=getrandom.hex_name(6),
            call=call,
            connection=connection,
            asked=asked,
            grant=dataclasses.replace(
                grant, peer=dataclasses.replace(grant.peer, groups=frozenset())
            ),
            queue=its_queue,
        )
        if job.writes and any(
            other.writes == job.writes and other.uid == job.uid for other in self
        ):
            raise conditions.DestBusy(path=job.writes)
        its_queue.join(job)
        # Of the clock, not counted: a token of the job list tells nobody how many others came.
        job.order = self._last_order = max(time.monotonic_ns(), self._last_order + 1)
        self._by_id[job.job_id] = job
        return job

    def remove(self, job: Job) -> None:
        """Remove a job from the table and its queue, and free its slot."""
        del self._by_id[job.job_id]
        job.close()
        if job.timer is not None:
            job.timer.cancel()
        if not job.queue.leave(job):
            job.queue.done(job)

    def find(self, job_id: str) -> Job | None:
        """The job of that id."""
        return self._by_id.get(job_id)

    def by_call(self, call: int) -> Job | None:
        """The job of a call of the front's."""
        return next((job for job in self if job.call == call), None)

    def by_pid(self, pid: int) -> Job | None:
        """The job whose process that is, or was left by it."""
        return next((job for job in self if pid in job.processes()), None)

    def processes(self) -> frozenset[int]:
        """All processes of all jobs that are our children."""
        return frozenset(pid for job in self for pid in job.processes())

    def by_connection(self, connection: int) -> list[Job]:
        """The jobs that were asked for over a connection."""
        return [job for job in self if job.connection.number == connection]
