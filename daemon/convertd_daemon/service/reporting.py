"""What the daemon reports to systemd, the journal and node_exporter."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convertd_daemon.service import audit, counters_file, metrics, notify

if TYPE_CHECKING:
    from collections.abc import Callable

    from convertd_core import messages


@dataclass(slots=True, kw_only=True)
class Status:
    """What `systemctl status` shows in one line, besides the current numbers."""

    policy_problem: str = ""
    last_refusal: str = ""

    def refused(self, record: audit.Record) -> None:
        """Remember a refusal, without the caller's own text."""
        when = time.strftime("%H:%M:%S")
        self.last_refusal = f"{record.reason} for uid {record.asked.caller.uid} at {when}"

    def line(self, now: messages.Stats, *, stopping: bool) -> str:
        """The line, printable whatever the policy's file is called."""
        parts = [f"{now.jobs_running} running, {now.jobs_queued} queued"]
        if stopping:
            parts.insert(0, "stopping")
        if self.policy_problem:
            parts.append(f"policy NOT reloaded, the old one is in force: {self.policy_problem}")
        if self.last_refusal:
            parts.append(f"last refusal {self.last_refusal}")
        text = "; ".join(parts)
        return "".join(character if character.isprintable() else "?" for character in text)


class Reporter:
    """Records requests, counts them, and shows the numbers of the moment.

    Attributes:
        stopping: whether the daemon accepts no more requests.
        metrics_path: the file for node_exporter, empty for none.
    """

    def __init__(
        self,
        after: Callable[[float, Callable[[], None]], object],
        now: Callable[[], messages.Stats],
    ) -> None:
        """Count from 0. `after` calls something later; `now` gives the numbers of the moment."""
        self.now = now
        self.stopping = False
        self.metrics_path = ""
        self.counters = metrics.Counters()
        self._after = after
        self._file = counters_file.Writer()
        self._status = Status()

    def on_reload(self, problem: str) -> None:
        """Note why a policy was not reloaded; empty if it was."""
        self._status.policy_problem = problem
        self.update_status()

    @property
    def pid(self) -> int:
        """The process that writes the counters; 0 if there is none."""
        return self._file.pid

    def report(self, record: audit.Record) -> None:
        """Record the end of a request."""
        audit.write(record)
        self.counters.count(record)
        if record.outcome is audit.Outcome.REFUSED:
            self._status.refused(record)
            self.update_status()

    def report_refused(self, asked: audit.RequestSummary, reason: str, detail: str = "") -> None:
        """Record a refusal."""
        refused = audit.Outcome.REFUSED
        self.report(audit.Record(asked=asked, outcome=refused, reason=reason, detail=detail))

    def update_status(self) -> None:
        """Give systemd a new line for `systemctl status`."""
        notify.status(self._status.line(self.now(), stopping=self.stopping))

    def write_counters(self) -> None:
        """Write the file for node_exporter, now and from now on, if the policy names one."""
        if self.metrics_path:
            from convertd_daemon.service import metrics_text  # noqa: PLC0415 - 7 MiB, for who wants it

            self._file.write(self.metrics_path, metrics_text.text(self.counters, self.now()))
        self._after(metrics.INTERVAL_S, self.write_counters)

    def write_last_counters(self) -> None:
        """Write the file once more, when the loop has ended and reaps no children."""
        self._file.finish()
        self.write_counters()
        self._file.finish()

    def on_exit(self, pid: int) -> bool:
        """Note that a process has ended; return whether it wrote the counters."""
        return self._file.ended(pid)
