"""The broker itself: what happens when somebody connects, asks, leaves, or ends.

It parses one kind of bytes, small typed messages from the front, which it takes for an enemy: a
message can name a connection that this process accepted, and acts with the rights of who is at its
other end, and with no others.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from convertd_core import codec, conditions, messages, values
from convertd_daemon import channel
from convertd_daemon.broker import (
    connections,
    front_supervisor,
    jobs,
    loop,
    pages,
    positions,
    workers,
)
from convertd_daemon.linux import (
    children,
    getrandom,
    peercred,
    scm_rights,
)
from convertd_daemon.policy import decide
from convertd_daemon.sandbox import closer
from convertd_daemon.service import (
    audit,
    counters_file,
    idle_exit,
    metrics,
    notify,
    status_line,
    watchdog,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from convertd_daemon.broker.connections import Connection
    from convertd_daemon.policy.decide import Policy
    from convertd_daemon.sandbox.identity import Identity
    from convertd_daemon.sandbox.setup import Setup
    from convertd_daemon.service.listen import Listener

log = logging.getLogger(__name__)

ENDING_S: Final = 5.0
"""How long a job that was told to end may take before it is killed, and after that before it is
called unkillable."""

FRONT_START_S: Final = 30.0
FRONT_RESTARTS: Final = 5
"""So many fronts may die before one has served; then the daemon gives up."""

FRONT_READS_S: Final = 10.0
"""A front that has messages waiting and takes none of them for so long is replaced. Sooner than
systemd's watchdog would replace all of us, jobs included."""

FRONT_STOP_S: Final = 5.0

CLOSING_S: Final = 0.2
"""In which room is made for connections that are to be closed by another process."""
STOP_MARGIN_S: Final = 5.0
TOO_LONG: Final = conditions.Unsupported(
    what="so long an answer", why="it does not fit into a message"
)
MOST_GROUPS_TOLD: Final = 16_384
OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What the broker is given at the start and keeps."""

    listener: Listener
    private: str
    front_user: Identity
    setup: Setup
    versions: messages.Versions
    reload: Callable[[], Policy | str]
    """Gives the new policy, or why the old one stays."""


class Broker:
    """The daemon's state: who is connected, what is queued, what runs."""

    def __init__(self, household: Config, rules: Policy) -> None:
        """Begin with nobody connected."""
        self.config = household
        self.rules = rules
        self.loop = loop.Loop()
        self.closer = closer.Closer(self.loop.after)
        self.connections = connections.Connections(rules.limits, self.closer)
        self.connections.prober = os.getpid()
        self.jobs = jobs.Jobs(rules.limits)
        self.positions = positions.Positions(self.loop, self.jobs, self.send_position)
        self.front: front_supervisor.FrontProcess | None = None
        self.backpressure_timer: loop.Timer | None = None
        self.fronts_lost = 0
        self.stopping = False
        self.ending_front = False
        self.accepting = False
        self.failed = ""
        self.counters = metrics.Counters()
        self.counters_file = counters_file.Writer()
        self.status_line = status_line.Status()
        self.watchdog = watchdog.Watchdog(
            self.loop, household.listener.sock, self.send, lambda: self.stopping
        )
        self.idle = idle_exit.Idle(self.loop, self.idle_exit)
        self.spare = workers.PreforkedJob(self.loop, household.setup, self.has_free_slot)

    def run(self, first: front_supervisor.FrontProcess) -> None:
        """Serve until SIGTERM or SIGINT, or until a front can't be kept alive. One is started."""
        self.loop.on_signals(
            {
                signal.SIGTERM: self.stop,
                signal.SIGINT: self.stop,
                signal.SIGHUP: self.reload,
                signal.SIGCHLD: self.reap,
            }
        )
        self.watch_front(first)
        self.reap()  # it may be gone already: until now nobody listened for that
        self.watchdog.tick()
        self.write_counters()
        self.loop.run()
        self.counters_file.finish()
        self.write_counters()
        self.counters_file.finish()

    # --- the front ---------------------------------------------------------------------------

    def watch_front(self, started: front_supervisor.FrontProcess) -> None:
        """Have a front. Nobody is accepted until it says that it serves."""
        self.front = started
        self.loop.watch(started.channel.fileno(), loop.READ, self.on_front_message)
        self.loop.after(FRONT_START_S, lambda: self._on_front_start_timeout(started))

    def _on_front_start_timeout(self, started: front_supervisor.FrontProcess) -> None:
        if self.front is started and not self.accepting and not self.stopping:
            log.error("the front did not begin to serve within %d s", FRONT_START_S)
            started.kill()

    def send(self, message: object, descriptor: int | None = None) -> None:
        """Send the front a message; a front that is gone is dealt with, not reported."""
        if self.front is None:
            scm_rights.close_all([] if descriptor is None else [descriptor])
            return
        try:
            self.front.send(message, descriptor)
        except channel.Closed:
            self.disconnect_front(self.front)
            return
        except channel.TooLong as error:
            # A caller in 65,536 groups, a policy of a megabyte: its call ends, and nothing else.
            log.warning("an answer does not fit into a message: %s", error)
            call = getattr(message, "call", None)
            if call is not None and not isinstance(message, messages.Refused):
                self.refuse(call, TOO_LONG.failure())
        if self.front.has_pending and self.backpressure_timer is None:
            self.apply_backpressure(self.front)

    def apply_backpressure(self, behind: front_supervisor.FrontProcess) -> None:
        """Take nothing new while the front has not read what there is for it.

        Neither a connection nor a request, of which each makes messages: what waits for a front
        stays within what the jobs there are, and the watchdog, can make. The front itself never
        waits to send.
        """
        self.loop.watch(behind.channel.fileno(), loop.WRITE, self.catch_up)
        self.loop.forget(self.config.listener.sock.fileno())
        self._schedule_read_check(behind)

    def _schedule_read_check(self, behind: front_supervisor.FrontProcess) -> None:
        sent = behind.sent
        self.backpressure_timer = self.loop.after(
            FRONT_READS_S, lambda: self._check_front_reads(behind, sent)
        )

    def _check_front_reads(self, behind: front_supervisor.FrontProcess, sent: int) -> None:
        # There may be room of which epoll says nothing until there is more.
        self.catch_up(loop.WRITE)
        if self.backpressure_timer is None:
            return
        if behind.sent > sent:
            self._schedule_read_check(behind)
        else:
            log.error("the front does not read its messages")
            behind.kill()

    def catch_up(self, _events: int) -> None:
        """Send what waits, and when nothing does, go on as before."""
        if self.front is None:
            return
        try:
            self.front.catch_up()
        except channel.Closed:
            self.disconnect_front(self.front)
            return
        if not self.front.has_pending:
            self.clear_backpressure()
            self.loop.watch(self.front.channel.fileno(), loop.READ, self.on_front_message)
            self.watch_listener()
            self.positions.notify()

    def clear_backpressure(self) -> None:
        """The front keeps up, or is gone."""
        if self.backpressure_timer is not None:
            self.backpressure_timer.cancel()
            self.backpressure_timer = None

    def disconnect_front(self, leaving: front_supervisor.FrontProcess) -> None:
        """Its end is closed, or half of it: an honest front ends now. Another never answers."""
        if self.ending_front:
            return  # we closed it ourselves, and the front has time to say the last words
        self.loop.forget(leaving.channel.fileno())
        self.stop_accepting()
        leaving.kill()

    def on_front_message(self, _events: int) -> None:
        """Take one message."""
        if self.front is None:
            return
        try:
            message, _ = self.front.channel.receive(*messages.FROM_FRONT, wait=False)
        except BlockingIOError:
            return
        except channel.Closed:
            self.disconnect_front(self.front)
            return
        except codec.CodecError:
            # We made it and it does not speak our language: it is no longer ours.
            log.exception("the front sent what is no message")
            self.disconnect_front(self.front)
            return
        self.dispatch(message)

    def on_front_exit(self) -> None:
        """The front's process is gone: so are its calls, and soon their jobs."""
        if self.front is not None:
            self.loop.forget(self.front.channel.fileno())
            # What it sent us at the last may have descriptors with it.
            self.closer.take(self.front.channel.sock)
            self.front.close()
            self.front = None
        self.clear_backpressure()
        self.stop_accepting()
        for connection in self.connections:
            self.drop(connection)
        self.connections.all_released()
        # What is still ending is no call of the next one's, which counts its own anew.
        for job in self.jobs:
            job.call = jobs.NO_CALL
        if self.stopping:
            return
        self.fronts_lost += 1
        if self.fronts_lost > FRONT_RESTARTS:
            self.failed = "the front ended again and again; the journal has its last words"
            self.loop.stop()
            return
        log.error("the front ended; starting another")
        self.watch_front(front_supervisor.start(self.config.front_user, self.config.private))

    # --- connections -------------------------------------------------------------------------

    def start_accepting(self) -> None:
        """Let people in."""
        self.accepting = True
        self.watch_listener()

    def watch_listener(self) -> None:
        """Hear of those who connect, if they are let in and the front keeps up."""
        if self.accepting and self.front is not None and not self.front.has_pending:
            self.loop.watch(self.config.listener.sock.fileno(), loop.READ, self.accept)

    def stop_accepting(self) -> None:
        """Leave those who connect in the socket's backlog."""
        self.accepting = False
        self.loop.forget(self.config.listener.sock.fileno())

    def accept(self, _events: int) -> None:
        """Take one of those who wait in the backlog, and hand it to the front.

        One each round of the loop, in which the front too is heard once: whoever connects as fast
        as it can must not hold up those who are connected.
        """
        if self.closer.is_full:
            log.warning("too many connections with descriptors wait to be closed")
            self.pause_accepting(CLOSING_S)
            return
        try:
            sock, _ = self.config.listener.sock.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in OUT_OF_DESCRIPTORS:
                log.warning("can't accept error=%s", error)
                self.pause_accepting(1.0)
            return  # else the peer was gone before we came. Source: accept(2)
        self.watchdog.on_accept()
        self.admit(sock)

    def pause_accepting(self, seconds: float) -> None:
        """Leave those who connect in the backlog for a while."""
        self.loop.forget(self.config.listener.sock.fileno())
        self.loop.after(seconds, self.watch_listener)

    def admit(self, sock: socket.socket) -> None:
        """Keep one descriptor of a connection, and send the front another."""
        try:
            connection = self.connections.admit(sock)
            if connection is None:
                return
        except OSError as error:
            log.info("connection lost at once error=%s", error)
            return
        try:
            theirs = os.dup(sock.fileno())
        except OSError as error:
            log.warning("can't hand on a connection error=%s", error)
            self.connections.drop(connection)
            return
        fd = sock.fileno()
        self.loop.watch(fd, loop.PEER_GONE, lambda _events: self.drop(connection))
        came = messages.Connected(connection=connection.number, uid=connection.uid)
        self.send(came, theirs)

    def drop(self, connection: Connection) -> None:
        """A peer is gone: what it asked for is called off."""
        self.loop.forget(connection.sock.fileno())
        self.connections.drop(connection)
        for job in self.jobs.by_connection(connection.number):
            self.end(job, conditions.CancelledByCaller())

    # --- requests ----------------------------------------------------------------------------

    def released(self, number: int) -> None:
        """The front has let go of a connection: it is over, if it was not yet."""
        connection = self.connections.kept(number)
        if connection is not None:
            self.drop(connection)
        self.connections.released(number)

    def dispatch(self, message: object) -> None:
        """Do what the front asks, as far as the peer of the connection it names may ask it."""
        match message:
            case messages.Ready():
                self.serve()
            case messages.CallAbandoned(call=call):
                self.abandon(call)
            case messages.JobFinished(call=call):
                self.finish(call)
            case (
                messages.Convert(call=call, connection=number)
                | messages.Inspect(call=call, connection=number)
                | messages.ListJobs(call=call, connection=number)
                | messages.CancelJob(call=call, connection=number)
                | messages.GetAccess(call=call, connection=number)
                | messages.GetStats(call=call, connection=number)
            ):
                self.handle(message, call, number)
            case messages.Released(connection=number):
                self.released(number)
            case messages.ProbeAnswered(probe=probe):
                self.watchdog.on_answer(probe)
            case messages.RequestRejected(connection=number, reason=reason):
                known = (
                    reason if reason in conditions.BY_REASON else conditions.InternalError.reason
                )
                who = audit.caller_on(self.connections.find(number))
                self.report_refused(audit.summary_of_message(message, who), known)

    def handle(self, message: object, call: int, number: int) -> None:
        """Answer one request or refuse it, and put that on record, unless a job will."""
        connection = self.connections.find(number)
        asked = audit.summary_of_message(message, audit.caller_on(connection))
        try:
            if connection is None:
                raise conditions.UnknownConnection
            self.answer(message, call, connection)
        except conditions.ConvertError as error:
            self.report_refused(asked, error.reason, str(error))
            self.refuse(call, error.failure())
        else:
            if not isinstance(message, messages.Convert | messages.Inspect):
                self.report(audit.Record(asked=asked, outcome=audit.Outcome.DONE))

    def report(self, record: audit.Record) -> None:
        """Put the end of a request on record."""
        audit.write(record)
        self.counters.count(record)
        if record.outcome is audit.Outcome.REFUSED:
            self.status_line.refused(record)
            self.update_status()

    def report_refused(self, asked: audit.RequestSummary, reason: str, detail: str = "") -> None:
        """Put a refusal on record."""
        refused = audit.Outcome.REFUSED
        self.report(audit.Record(asked=asked, outcome=refused, reason=reason, detail=detail))

    def answer(self, message: object, call: int, connection: Connection) -> None:
        """Answer one request, or put it in its queue.

        Raises:
            conditions.ConvertError: the request is refused, and why.
        """
        peer = self.connections.peer_among(connection, self.rules.gids)
        match message:
            case messages.Convert(request=request) | messages.Inspect(request=request):
                self.enqueue(call, connection, self.may(peer, request))
            case messages.ListJobs(page_size=size, page_token=token):
                self.list_jobs(call, peer, size, token)
            case messages.CancelJob(job_id=job_id):
                self.cancel(call, peer, job_id)
            case messages.GetAccess():
                self.send_access(call, connection)
            case messages.GetStats():
                self.send_stats(call, peer)

    def may(
        self, peer: values.Peer, request: values.ConvertRequest | values.InspectRequest
    ) -> values.ConvertGrant | values.InspectGrant:
        """Ask the policy.

        Raises:
            conditions.ConvertError: the request is refused, and why.
        """
        if self.stopping:
            raise conditions.Stopping
        if isinstance(request, values.ConvertRequest):
            return decide.decide(self.rules, peer, request)
        return decide.decide_inspect(self.rules, peer, request)

    def enqueue(
        self, call: int, connection: Connection, grant: values.ConvertGrant | values.InspectGrant
    ) -> None:
        """Put a granted request in line; it starts at once if there is a place.

        Raises:
            conditions.QueueFull, conditions.DestBusy: as they say.
        """
        if self.jobs.by_call(call) is not None:
            raise conditions.BadMessage(problem="this call has a job already")
        job = self.jobs.add(call, connection, grant)
        log.info(
            "granted job=%s uid=%d gid=%d pid=%d rule=%s source=%r dest=%r",
            job.job_id,
            grant.peer.uid,
            grant.peer.gid,
            grant.peer.pid,
            grant.rule,
            grant.request.source.path,
            job.entry(call).dest,
        )
        self.advance()

    def advance(self) -> None:
        """Start whatever has a place, and tell the others where they stand."""
        for queue_ in (self.jobs.conversions, self.jobs.inspections):
            while not self.stopping and (job := queue_.next()) is not None:
                self.start(job)
        self.positions.notify()
        self.update_status()

    def send_position(self, job: jobs.Job) -> bool:
        """Tell a caller where it stands; a front that is behind is told the last of it later."""
        if self.front is None or self.front.has_pending:
            return False
        self.send(messages.Queued(call=job.call, job_id=job.job_id, position=job.position))
        return True

    def start(self, job: jobs.Job) -> None:
        """Have a process do a job, and give the front the other end of its channel."""
        try:
            channel_ = job.start(self.spare, self.connections.peer_on(job.connection))
        except OSError:
            error_id = getrandom.hex_name(6)
            log.exception("could not fork a job id=%s", error_id)
            failure = conditions.InternalError(error_id=error_id).failure()
            self.report(job.record(None, failure))
            self.refuse(job.call, failure)
            self.jobs.remove(job)
            return
        log.debug("started job=%s pid=%d", job.job_id, job.pid)
        descriptor = channel_.sock.detach()
        self.send(messages.Started(call=job.call, job_id=job.job_id), descriptor)
        self.spare.schedule_fork(len(self.jobs))
        duration_s = job.grant.limits.duration_s
        overdue = conditions.DurationExceeded(duration_s=duration_s)
        # The job minds its time itself; this is for one that can't, being stuck in the kernel.
        job.timer = self.loop.after(duration_s + ENDING_S, lambda: self.end(job, overdue))

    def has_free_slot(self) -> bool:
        """Whether a conversion could begin at once."""
        return not self.stopping and self.jobs.conversions.running < self.rules.limits.jobs

    def refuse(self, call: int, failure: conditions.Failure) -> None:
        """End a call with a condition."""
        self.send(messages.Refused(call=call, failure=failure))

    def list_jobs(self, call: int, peer: values.Peer, size: int, token: str) -> None:
        """Send a page of the jobs that a peer may see: its own, or all to an operator.

        Raises:
            conditions.BadOption: there is no such page.
        """
        everybody = decide.is_operator(self.rules, peer)
        seen = (job for job in self.jobs if everybody or job.uid == peer.uid)
        page, following = pages.page_of(seen, size, token)
        for job in page:
            self.send(job.entry(call))
        self.send(messages.ReplyComplete(call=call, next_page_token=following))

    def cancel(self, call: int, peer: values.Peer, job_id: str) -> None:
        """Cancel a job for its owner or an operator; the answer shows the job.

        Raises:
            conditions.JobNotFound: there is none, or it is somebody else's.
        """
        job = self.jobs.find(job_id)
        own = job is not None and job.uid == peer.uid
        if job is None or not (own or decide.is_operator(self.rules, peer)):
            raise conditions.JobNotFound(job_id=job_id[:64])
        log.info("cancelled job=%s by uid=%d", job.job_id, peer.uid)
        entry = job.entry(call)
        self.end(job, conditions.CancelledByCaller() if own else conditions.CancelledByOperator())
        self.send(entry)
        self.send(messages.ReplyComplete(call=call))

    def send_access(self, call: int, connection: Connection) -> None:
        """Say who we take the peer for, and what it may do.

        Raises:
            conditions.Unsupported: it is in more groups than a message is made for.
        """
        if peercred.group_count(connection.sock) > MOST_GROUPS_TOLD:
            raise TOO_LONG
        peer = connection.peer()
        self.send(
            messages.AccessReport(
                call=call,
                uid=peer.uid,
                gid=peer.gid,
                groups=peer.groups,
                rights=decide.access_of(self.rules, peer),
                limits=self.rules.limits,
                versions=self.config.versions,
            )
        )

    def send_stats(self, call: int, peer: values.Peer) -> None:
        """Give an operator the counters.

        Raises:
            conditions.PermissionDenied: the peer is none.
        """
        if not decide.is_operator(self.rules, peer):
            raise conditions.PermissionDenied(uid=peer.uid, action="read the daemon's counters")
        now = self.now()
        self.send(
            messages.StatsReport(
                call=call,
                started=self.counters.start_time,
                running=now.running,
                queued=now.queued,
                connections=now.connections,
                bounds=metrics.BOUNDS_S,
            )
        )
        for message in self.counters.messages(call):
            self.send(message)
        self.send(messages.ReplyComplete(call=call))

    def abandon(self, call: int) -> None:
        """A call is over for the front. If its job is not, it is soon: its channel is closed."""
        job = self.jobs.by_call(call)
        if job is not None:
            self.end(job, conditions.CancelledByCaller())

    def finish(self, call: int) -> None:
        """A call's job has done what it will. Its destination is free before its process ends.

        A front that lies about this gains nothing: linkat(2) refuses a name that exists.
        """
        job = self.jobs.by_call(call)
        if job is not None:
            job.finished = True

    # --- ends --------------------------------------------------------------------------------

    def end(self, job: jobs.Job, why: conditions.ConvertError) -> None:
        """Take a job out of the queue, or have its process end: first asked, then killed."""
        if self.jobs.find(job.job_id) is not job or job.ending is not None:
            return
        job.ending = why.failure()
        if job.is_writing_a_device:
            job.ending = job.ending.with_undefined(job.writes)
        if job.state is jobs.State.WAITING:
            self.report(job.record(None, job.ending))
            self.jobs.remove(job)
            self.refuse(job.call, job.ending)
            self.advance()
            return
        job.state = jobs.State.ENDING
        job.signal(signal.SIGTERM)
        self.loop.after(ENDING_S, lambda: self._kill(job))

    def _kill(self, job: jobs.Job) -> None:
        if self.jobs.find(job.job_id) is job:
            job.signal(signal.SIGKILL)
            self.loop.after(ENDING_S, lambda: self._mark_unkillable(job))

    def _mark_unkillable(self, job: jobs.Job) -> None:
        """A process in state D: its caller is told, its place stays taken, the job list says so."""
        if self.jobs.find(job.job_id) is job and job.ending is not None:
            log.error("job can't be killed job=%s pids=%s", job.job_id, sorted(job.processes()))
            job.state = jobs.State.UNKILLABLE
            self.send(messages.Ended(job_id=job.job_id, failure=job.ending))

    def reap(self) -> None:
        """Take the exit status of whatever has ended: jobs, the front, orphans of either."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            self.on_child_exit(pid, os.waitstatus_to_exitcode(status))
        if self.stopping:
            self.stop_if_done()

    def on_child_exit(self, pid: int, status: int) -> None:
        """One process is gone. Of one that nobody knows nothing need be known."""
        if self.front is not None and pid == self.front.pid:
            log.info("front ended pid=%d status=%d", pid, status)
            self.on_front_exit()
            return
        if self.counters_file.ended(pid) or self.closer.ended(pid):
            return
        job = self.jobs.by_pid(pid)
        if job is None:
            self.spare.on_exit(pid)
            return
        if pid == job.pid:
            self._on_job_exit(job, status)
        job.left.discard(pid)
        if not job.left:
            self.jobs.remove(job)
            self.advance()
            self.spare.schedule_fork(len(self.jobs))

    def _on_job_exit(self, job: jobs.Job, status: int) -> None:
        """A job's own process is gone: its call ends. Its place is taken while anything is left."""
        job.left = set(self._orphans())
        failure = job.ending or self._failure_without_outcome(job, status)
        account = job.account()
        cut = account is not None and not job.ending and not account.done and not account.reason
        # The front closed the job's channel before it told us why: its caller was gone.
        self.report(
            job.record(account, conditions.CancelledByCaller().failure() if cut else failure)
        )
        self.send(messages.Ended(job_id=job.job_id, failure=failure))
        job.pid = 0
        if job.left:
            job.ending = failure
            self._kill(job)

    def _orphans(self) -> frozenset[int]:
        """Children of ours that we did not start: a job that ended left them to us."""
        front_pid = self.front.pid if self.front is not None else 0
        own = {self.spare.pid, front_pid, self.counters_file.pid, *self.closer.processes}
        return children.of_self() - self.jobs.processes() - own

    def _failure_without_outcome(self, job: jobs.Job, status: int) -> conditions.Failure:
        """What the caller is told if the job said nothing itself. Most jobs did."""
        if status == -signal.SIGKILL:
            log.warning("job was killed job=%s pid=%d", job.job_id, job.pid)
            return conditions.OutOfMemory().failure()
        error_id = job.job_id
        if status != 0:
            log.error("job ended job=%s status=%d id=%s", job.job_id, status, error_id)
        return conditions.InternalError(error_id=error_id).failure()

    # --- the service -------------------------------------------------------------------------

    def serve(self) -> None:
        """The front serves: so do we."""
        if self.accepting or self.stopping:
            return
        self.fronts_lost = 0
        self.start_accepting()
        notify.ready()
        self.update_status()
        self.watch_idle()
        self.spare.schedule_fork(len(self.jobs))
        log.info("serving versions=%s", self.config.versions)

    def reload(self) -> None:
        """Take a new policy, or keep the one in force. Running jobs keep theirs."""
        notify.reloading()
        rules = self.config.reload()
        self.status_line.policy_problem = rules if isinstance(rules, str) else ""
        if not isinstance(rules, str):
            self.rules = rules
            self.connections.limits = rules.limits
            self.jobs.set_limits(rules.limits)
            self.advance()
            self.watch_idle()
        notify.ready()
        self.update_status()

    def now(self) -> metrics.Now:
        """What is going on."""
        queue_ = self.jobs.conversions
        return metrics.Now(
            running=queue_.running, queued=len(queue_), connections=len(self.connections)
        )

    def update_status(self) -> None:
        """Give systemd a new line for `systemctl status`."""
        notify.status(self.status_line.line(self.now(), stopping=self.stopping))

    def write_counters(self) -> None:
        """Write the file for node_exporter, now and from now on, if the policy names one."""
        if self.rules.service.metrics:
            from convertd_daemon.service import metrics_text  # noqa: PLC0415 - 7 MiB, for who wants it

            text = metrics_text.text(self.counters, self.now())
            self.counters_file.write(self.rules.service.metrics, text)
        self.loop.after(metrics.INTERVAL_S, self.write_counters)

    def watch_idle(self) -> None:
        """End when there is nothing to do for as long as the policy says, if systemd listens."""
        if not self.config.listener.own_path:
            self.idle.watch(self.rules.service.idle_exit_s, self.is_idle)

    def is_idle(self) -> bool:
        """Whether nobody is connected, but for our own probe, and nothing runs."""
        others = any(connection.caller.pid != os.getpid() for connection in self.connections)
        return not others and not len(self.jobs)

    def idle_exit(self) -> None:
        """Nobody needs us: the socket will start another."""
        log.info("idle for %g s", self.rules.service.idle_exit_s)
        self.stop()

    def stop(self) -> None:
        """Take no more, let what runs finish for a while; asked twice, end it now."""
        if self.stopping:
            self.end_all()
            return
        self.stopping = True
        self.spare.end()
        grace_s = self.rules.limits.stop_grace_s
        notify.stopping(grace_s + 2 * ENDING_S + FRONT_STOP_S + STOP_MARGIN_S)
        self.update_status()
        self.stop_accepting()
        self.config.listener.close(self.closer.close)
        for job in self.jobs:
            if job.state is jobs.State.WAITING:
                self.end(job, conditions.Stopping())
        log.info("stopping running=%d", len(self.jobs))
        self.loop.after(grace_s, self.end_all)
        self.stop_if_done()

    def end_all(self) -> None:
        """The grace is over."""
        for job in self.jobs:
            self.end(job, conditions.Stopping())

    def stop_if_done(self) -> None:
        """When no job runs, end the front, and with it the loop. What can't be killed is left."""
        if any(job.pid for job in self.jobs):
            return
        if self.front is None:
            self.loop.stop()
            return
        if self.ending_front:
            return
        ending, self.ending_front = self.front, True
        # The front sends what it still has to say, and ends when our end is closed.
        self.loop.forget(ending.channel.fileno())
        ending.channel.sock.shutdown(socket.SHUT_RDWR)
        self.loop.after(FRONT_STOP_S, lambda: self._kill_front(ending))

    def _kill_front(self, ending: front_supervisor.FrontProcess) -> None:
        if self.front is ending:
            ending.kill()
