"""The requests of callers: the handler of each, its summary for the audit record, its replies.

The front is not trusted. A request names a connection that the broker accepted, and is handled with
the rights of that connection's peer, and with no others.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from convertd_core import conditions, messages, results, values
from convertd_daemon.broker import front_supervisor, job_list
from convertd_daemon.linux import peercred
from convertd_daemon.policy import decide
from convertd_daemon.service import audit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from convertd_daemon import channel
    from convertd_daemon.broker.connections import Connection, Connections
    from convertd_daemon.broker.job_supervisor import JobSupervisor
    from convertd_daemon.policy.decide import Policy
    from convertd_daemon.service.reporting import Reporter
    from convertd_daemon.service.selftest import SelfTest

    Replies = Iterable[messages.ReplyBody]

log = logging.getLogger(__name__)

B = TypeVar("B")

MOST_GROUPS_TOLD: Final = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """One request: its call, its connection, its peer, and its summary for the audit record.

    `peer` has those of its groups that the policy names.
    """

    call: int
    connection: Connection
    peer: values.Peer
    asked: audit.RequestSummary


class Handlers:
    """What each request does, under the policy in force.

    Each returns the replies, in order, with a ReplyComplete at the end, or raises
    conditions.ConvertError. For a request that has a job there are none: the job's events are the
    reply, and the record is written when it ends.
    """

    def __init__(
        self,
        rules: Policy,
        versions: results.Versions,
        tested: SelfTest,
        supervisor: JobSupervisor,
        reporter: Reporter,
    ) -> None:
        self.rules = rules
        self.is_stopping = False
        self._versions = versions
        self._tested = tested
        self._supervisor = supervisor
        self._reporter = reporter

    def convert(self, asking: Asking, request: values.ConvertRequest) -> Replies:
        """Queue a conversion.

        Raises:
            conditions.ConvertError: it is not allowed, or there is no room.
        """
        if self.is_stopping:
            raise conditions.Stopping
        self._enqueue(asking, decide.decide(self.rules, asking.peer, request))
        return ()

    def inspect(self, asking: Asking, request: values.InspectRequest) -> Replies:
        """Queue an inspection.

        Raises:
            conditions.ConvertError: it is not allowed, or there is no room.
        """
        if self.is_stopping:
            raise conditions.Stopping
        self._enqueue(asking, decide.decide_inspect(self.rules, asking.peer, request))
        return ()

    def _enqueue(self, asking: Asking, grant: values.Grant) -> None:
        self._supervisor.enqueue(asking.call, asking.connection, grant, asking.asked)

    def list_jobs(self, asking: Asking, request: messages.ListJobs) -> Replies:
        """Return a page of the jobs that a peer may see: its own, or all to an operator.

        Raises:
            conditions.BadOption: there is no such page.
        """
        everybody = decide.is_operator(self.rules, asking.peer)
        seen = (job for job in self._supervisor.jobs if everybody or job.uid == asking.peer.uid)
        page, following = job_list.page_of(seen, request.page_size, request.page_token)
        yield from page
        yield messages.ReplyComplete(next_page_token=following)

    def cancel_job(self, asking: Asking, request: messages.CancelJob) -> Replies:
        """Cancel a job for its owner or an operator; the answer shows the job.

        Raises:
            conditions.JobNotFound: there is none, or it is somebody else's.
        """
        job = self._supervisor.jobs.find(request.job_id)
        own = job is not None and job.uid == asking.peer.uid
        if job is None or not (own or decide.is_operator(self.rules, asking.peer)):
            raise conditions.JobNotFound(job_id=request.job_id[:64])
        log.info("cancelled job=%s by uid=%d", job.job_id, asking.peer.uid)
        entry = job_list.entry_of(job)
        self._supervisor.end(
            job, conditions.CancelledByCaller() if own else conditions.CancelledByOperator()
        )
        yield entry
        yield messages.ReplyComplete()

    def get_access(self, asking: Asking, _request: messages.GetAccess) -> Replies:
        """Return who the peer is, and what it may do.

        Raises:
            conditions.Unsupported: it is in more groups than a message can hold.
        """
        if peercred.group_count(asking.connection.sock) > MOST_GROUPS_TOLD:
            raise front_supervisor.TOO_LONG
        peer = asking.connection.peer()
        yield results.Access(
            uid=peer.uid,
            gid=peer.gid,
            groups=tuple(sorted(peer.groups)),
            is_operator=decide.is_operator(self.rules, peer),
            grants=decide.grants_of(self.rules, peer),
            limits=self.rules.limits,
            versions=self._versions,
            source_formats=tuple(sorted(self._tested.formats)),
            dest_formats=tuple(sorted(self._tested.formats & values.WRITABLE_FORMATS)),
            compressions=self._tested.compressions,
        )
        yield messages.ReplyComplete()

    def get_stats(self, asking: Asking, _request: messages.GetStats) -> Replies:
        """Return the counters to an operator.

        Raises:
            conditions.PermissionDenied: the peer is none.
        """
        if not decide.is_operator(self.rules, asking.peer):
            raise conditions.PermissionDenied(
                uid=asking.peer.uid, action="read the daemon's counters"
            )
        yield self._reporter.now()
        yield from self._reporter.counters.messages()
        yield messages.ReplyComplete()


@dataclass(frozen=True, slots=True)
class Row(Generic[B]):
    """One kind of request: its handler, and what makes its summary for the audit record.

    `has_job` says that a job replies, and that the record is written when the job has ended.
    """

    handle: Callable[[Handlers, Asking, B], Replies]
    summary: Callable[[B, audit.Caller], audit.RequestSummary]
    has_job: bool = False


def _query(operation: messages.Operation) -> Callable[[object, audit.Caller], audit.RequestSummary]:
    """What makes the summary of a request that touches no image and no job."""
    return lambda _, caller: audit.RequestSummary(operation=operation, caller=caller, is_query=True)


ROWS: Final[Mapping[type[Any], Row[Any]]] = {
    values.ConvertRequest: Row(Handlers.convert, audit.conversion, has_job=True),
    values.InspectRequest: Row(Handlers.inspect, audit.inspection, has_job=True),
    messages.ListJobs: Row(Handlers.list_jobs, _query(messages.Operation.LIST_JOBS)),
    messages.CancelJob: Row(Handlers.cancel_job, audit.cancellation),
    messages.GetAccess: Row(Handlers.get_access, _query(messages.Operation.GET_ACCESS)),
    messages.GetStats: Row(Handlers.get_stats, _query(messages.Operation.GET_STATS)),
}


class Dispatcher:
    """Handles each request, sends its replies, and reports it for the audit record."""

    def __init__(
        self,
        handlers: Handlers,
        connections: Connections,
        front: channel.Sender,
        reporter: Reporter,
    ) -> None:
        self._handlers = handlers
        self._connections = connections
        self._front = front
        self._reporter = reporter

    def _caller_on(self, connection: Connection | None) -> audit.Caller:
        return audit.NOBODY if connection is None else connection.caller

    def dispatch(self, request: messages.Request) -> None:
        """Handle one request, or refuse it, and report that, unless a job will."""
        row = ROWS[type(request.body)]
        connection = self._connections.find(request.connection)
        asked = row.summary(request.body, self._caller_on(connection))
        try:
            if connection is None:
                raise conditions.UnknownConnection
            peer = self._connections.peer_among(connection, self._handlers.rules.gids)
            asking = Asking(call=request.call, connection=connection, peer=peer, asked=asked)
            for body in row.handle(self._handlers, asking, request.body):
                self._front.send(messages.Reply(call=request.call, body=body))
        except conditions.ConvertError as error:
            self._reporter.report_refused(asked, error.reason, str(error))
            refused = messages.Refused(failure=error.failure())
            self._front.send(messages.Reply(call=request.call, body=refused))
        else:
            if not row.has_job:
                self._reporter.report(audit.Record(asked=asked, outcome=audit.Outcome.DONE))

    def on_rejected(self, message: messages.RequestRejected) -> None:
        """Report a request that the front itself refused, by a reason that exists."""
        known = message.reason in conditions.BY_REASON
        reason = message.reason if known else conditions.InternalError.reason
        caller = self._caller_on(self._connections.find(message.connection))
        asked = audit.RequestSummary(operation=message.operation, caller=caller)
        self._reporter.report_refused(asked, reason)
