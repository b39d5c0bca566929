"""The one line that `systemctl status` shows."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convertd_daemon.service import audit, metrics


@dataclass(slots=True, kw_only=True)
class Status:
    """What the line shows besides the current numbers."""

    policy_problem: str = ""
    last_refusal: str = ""

    def refused(self, record: audit.Record) -> None:
        """Remember a refusal, without the caller's own text."""
        when = time.strftime("%H:%M:%S")
        self.last_refusal = f"{record.reason} for uid {record.asked.caller.uid} at {when}"

    def line(self, now: metrics.Now, *, stopping: bool) -> str:
        """The line, printable whatever the policy's file is called."""
        parts = [f"{now.running} running, {now.queued} queued"]
        if stopping:
            parts.insert(0, "stopping")
        if self.policy_problem:
            parts.append(f"policy NOT reloaded, the old one is in force: {self.policy_problem}")
        if self.last_refusal:
            parts.append(f"last refusal {self.last_refusal}")
        text = "; ".join(parts)
        return "".join(character if character.isprintable() else "?" for character in text)
