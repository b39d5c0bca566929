"""The broker: its parts, and the events that they exchange.

It parses only small typed messages of the front, which it does not trust: see dispatch.py.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from convertd_core import messages, results
from convertd_daemon import loop
from convertd_daemon.broker import (
    acceptor,
    connections,
    dispatch,
    front_supervisor,
    job_supervisor,
    jobs,
)
from convertd_daemon.job import process
from convertd_daemon.linux import children
from convertd_daemon.sandbox import closer, front_process
from convertd_daemon.service import idle_exit, notify, reporting, watchdog

if TYPE_CHECKING:
    from collections.abc import Callable

    from convertd_daemon.policy.decide import Policy
    from convertd_daemon.sandbox.identity import Identity
    from convertd_daemon.sandbox.setup import Setup
    from convertd_daemon.service import selftest
    from convertd_daemon.service.listen import Listener

log = logging.getLogger(__name__)

STOP_MARGIN_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What the broker gets at the start."""

    listener: Listener
    private: str
    front_user: Identity
    setup: Setup
    versions: results.Versions
    tested: selftest.SelfTest
    reload: Callable[[], Policy | str]  # the new policy, or why the old one stays


class Broker:
    """The daemon: puts its parts together, starts and stops them, and reloads the policy."""

    def __init__(self, config: Config, rules: Policy) -> None:
        self.failed = ""
        self._config = config
        self._rules = rules
        self._is_stopping = False
        self._is_serving = False
        self._loop = loop.Loop()
        self._closer = closer.Closer(self._loop.after)
        self._connections = connections.Connections(rules.limits, self._closer)
        self._connections.prober = os.getpid()
        self._jobs = jobs.Jobs(rules.limits)
        self._spare = process.PreforkedJob(
            self._loop, config.setup, lambda: self._jobs.conversions.has_free_slot
        )
        self._reporter = reporting.Reporter(self._loop.after, self._now)
        self._front = front_supervisor.FrontSupervisor(
            self._loop,
            self._closer,
            lambda: front_process.start(config.front_user, config.private),
            self,
        )
        self._supervisor = job_supervisor.JobSupervisor(
            self._loop, self._jobs, self._spare, self._front, self._reporter
        )
        self._handlers = dispatch.Handlers(
            rules, config.versions, config.tested, self._supervisor, self._reporter
        )
        self._dispatcher = dispatch.Dispatcher(
            self._handlers, self._connections, self._front, self._reporter
        )
        self._watchdog = watchdog.Watchdog(
            self._loop, config.listener.sock, self._front.send, lambda: self._is_stopping
        )
        self._acceptor = acceptor.Acceptor(
            self._loop,
            config.listener.sock,
            self._connections,
            self._front,
            on_accept=self._watchdog.on_accept,
            on_disconnect=self._supervisor.on_disconnect,
        )
        self._idle = idle_exit.Idle(self._loop, self._stop)

    def run(self, first: front_process.Started) -> None:
        """Serve until SIGTERM or SIGINT, or until a front can't be kept alive. One is started."""
        self._loop.on_signals(
            {
                signal.SIGTERM: self._stop,
                signal.SIGINT: self._stop,
                signal.SIGHUP: self._reload,
                signal.SIGCHLD: self._reap,
            }
        )
        self._front.watch(first)
        self._reap()  # the front may have ended before SIGCHLD was handled
        self._watchdog.tick()
        self._reporter.metrics_path = self._rules.service.metrics
        self._reporter.write_counters()
        self._loop.run()
        self._reporter.write_last_counters()

    def on_front_message(self, message: messages.FromFront) -> None:
        """Handle a message of the front, with the rights of the peer that it names."""
        match message:
            case messages.Ready():
                self._serve()
            case messages.CallAbandoned(call=call):
                self._supervisor.on_abandoned(call)
            case messages.JobFinished(call=call):
                self._supervisor.on_finished(call)
            case messages.Released(connection=number):
                self._acceptor.on_released(number)
            case messages.ProbeAnswered(probe=probe):
                self._watchdog.on_answer(probe)
            case messages.RequestRejected():
                self._dispatcher.on_rejected(message)
            case messages.Request():
                self._dispatcher.dispatch(message)

    def on_front_behind(self) -> None:
        """Accept no connections: each makes messages."""
        self._acceptor.pause()

    def on_front_caught_up(self) -> None:
        """Accept connections again."""
        self._acceptor.resume()
        self._supervisor.notify_positions()

    def on_front_disconnected(self) -> None:
        """Leave new connections to the next front."""
        self._acceptor.stop()

    def on_front_exit(self) -> None:
        """Drop the front's connections and calls."""
        self._is_serving = False
        self._acceptor.on_front_exit()
        self._supervisor.on_front_exit()

    def on_front_failed(self, why: str) -> None:
        """Give up: no caller could be served."""
        self.failed = why
        self._loop.stop()

    def _reap(self) -> None:
        """Reap all children that have ended: jobs, the front, orphans of either."""
        for pid, status in children.reaped():
            self._on_child_exit(pid, status)
        if self._is_stopping:
            self._stop_if_done()

    def _on_child_exit(self, pid: int, status: int) -> None:
        """Report the exit of a child to the part that it belongs to, if any."""
        if self._front.on_exit(pid, status) or self._reporter.on_exit(pid):
            return
        if not self._closer.ended(pid):
            others = {self._front.pid, self._reporter.pid, *self._closer.processes}
            self._supervisor.on_exit(pid, status, frozenset(others))

    def _serve(self) -> None:
        """Serve, for the front is ready."""
        if self._is_serving or self._is_stopping:
            return
        self._is_serving = True
        self._front.on_ready()
        self._acceptor.start()
        notify.ready()
        self._reporter.update_status()
        self._watch_idle()
        self._spare.schedule_fork(len(self._jobs))
        versions = dataclasses.astuple(self._config.versions)
        log.info("serving version=%s qemu_img=%s landlock=%d kernel=%s", *versions)

    def _reload(self) -> None:
        """Reload the policy, or keep the one in force. Running jobs keep theirs."""
        notify.reloading()
        rules = self._config.reload()
        if not isinstance(rules, str):
            self._rules = self._handlers.rules = rules
            self._connections.limits = rules.limits
            self._jobs.set_limits(rules.limits)
            self._reporter.metrics_path = rules.service.metrics
            self._supervisor.advance()
            self._watch_idle()
        notify.ready()
        self._reporter.on_reload(rules if isinstance(rules, str) else "")

    def _now(self) -> messages.Stats:
        """The numbers of this moment."""
        return messages.Stats(
            start_time=self._reporter.counters.start_time,
            jobs_running=self._jobs.conversions.running,
            jobs_queued=len(self._jobs.conversions),
            connections=len(self._connections),
        )

    def _watch_idle(self) -> None:
        """Exit when idle for as long as the policy says, if systemd listens."""
        if not self._config.listener.own_path:
            self._idle.watch(self._rules.service.idle_exit_s, self._is_idle)

    def _is_idle(self) -> bool:
        """Whether nobody is connected, but for our own probe, and nothing runs."""
        others = any(one.pid != self._connections.prober for one in self._connections)
        return not others and not len(self._jobs)

    def _stop(self) -> None:
        """Stop: let jobs finish for a while; at a second signal, end them now."""
        if self._is_stopping:
            self._supervisor.end_all()
            return
        self._is_stopping = self._handlers.is_stopping = self._reporter.stopping = True
        self._front.is_last = True
        grace_s = self._rules.service.stop_grace_s
        ending_s = 2 * job_supervisor.ENDING_S + front_supervisor.STOP_S + STOP_MARGIN_S
        notify.stopping(grace_s + ending_s)
        self._reporter.update_status()
        self._acceptor.stop()
        self._config.listener.close(self._closer.close)
        self._supervisor.drain()
        log.info("stopping running=%d", len(self._jobs))
        self._loop.after(grace_s, self._supervisor.end_all)
        self._stop_if_done()

    def _stop_if_done(self) -> None:
        """When no job runs, end the front, then the loop. Unkillable processes are left."""
        if not any(job.pid for job in self._jobs) and not self._front.end():
            self._loop.stop()
