"""Where those who wait stand: who is new hears it at once, the others now and then."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from convertd_daemon.broker.jobs import Job, Jobs
    from convertd_daemon.broker.loop import Loop, Timer

AGAIN_S: Final = 0.2
"""How long nobody is told anew after somebody was. Each start moves everybody up, and each message
costs front and caller processor time that conversions need."""


class Positions:
    """Numbers the jobs that wait, and has their callers told.

    `send` tells one caller, and says False if nobody can be told at present; whoever knows when
    that is over calls `tell` again.
    """

    def __init__(self, loop: Loop, jobs: Jobs, send: Callable[[Job], bool]) -> None:
        self._loop = loop
        self._jobs = jobs
        self._send = send
        self._due = 0.0
        self._timer: Timer | None = None

    def notify(self) -> None:
        """Number those that wait anew, and tell whoever may be told now; the others later."""
        now = time.monotonic()
        is_due = now >= self._due
        moved, held_back = self._jobs.moved(), False
        for job in moved:
            if job.told_position and not is_due:
                held_back = True
            elif self._send(job):
                job.told_position = job.position
            else:
                return
        if is_due and moved:
            self._due = now + AGAIN_S
        elif held_back and self._timer is None:
            self._timer = self._loop.after(self._due - now, self._again)

    def _again(self) -> None:
        self._timer = None
        self.notify()
