"""A job's process, as the broker sees it: forked, perhaps ahead of its job, for one order.

fork(2) takes milliseconds, and a process is slow at first, until it has its own copy of each page
that it writes to. So one process is kept that waits for an order. It holds nothing of anybody's: no
grant, no connection, no descriptor but the ends of its own channels. Each serves one job and ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from convertd_daemon import channel, codec, model
from convertd_daemon.broker import emptied
from convertd_daemon.job import account as job_account
from convertd_daemon.job import main as job_main
from convertd_daemon.sandbox import enter

if TYPE_CHECKING:
    from collections.abc import Callable

    from convertd_daemon.broker.loop import Loop, Timer
    from convertd_daemon.sandbox.setup import Setup

log = logging.getLogger(__name__)

FORK_AFTER_S: Final[tuple[float, ...]] = (0.0, 0.06, 0.02)
"""When the next spare is forked, by how many jobs there are: none, one, more. A small job that has
the machine to itself would be hindered, by a tenth of 36 ms (2 cores): it is let end first."""


@dataclass(slots=True, kw_only=True, eq=False)
class Worker:
    """A forked process that waits for its order, or has had it.

    Owns the broker's end of the way orders go, the front's end of the job's channel, and the pipe
    in which the job says how it ended.
    """

    pid: int
    orders: channel.Channel
    line: channel.Channel
    account: int

    def order(self, job_id: str, grant: model.Grant | model.InspectGrant) -> None:
        """Have it do a job.

        Raises:
            channel.Closed: it is gone.
            channel.TooLong: the grant can't be sent; nothing was.
        """
        begin = channel.Begin(
            job_id=job_id,
            convert=grant if isinstance(grant, model.Grant) else None,
            inspect=grant if isinstance(grant, model.InspectGrant) else None,
        )
        self.orders.send(begin)
        self.orders.close()

    def end(self) -> None:
        """End one that has had no order."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.close()

    def close(self) -> None:
        """Close what belongs to it."""
        self.orders.close()
        self.line.close()
        os.close(self.account)


def fork(setup: Setup, begun: job_main.Begun | None = None) -> Worker:
    """Fork a worker, that waits for an order unless it has been given one.

    Raises:
        OSError: no process, or no descriptors, to be had.
    """
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        orders, orders_end = channel.Channel.pair()
        ours.enter_context(orders)
        theirs.enter_context(orders_end)
        line, line_end = channel.Channel.pair()
        ours.enter_context(line)
        theirs.enter_context(line_end)
        account, account_end = os.pipe()
        ours.callback(os.close, account)
        theirs.callback(os.close, account_end)
        child_is_empty = emptied.Emptied()
        # Held back until the worker has let go of our wakeup descriptor: a SIGTERM to it would be
        # written there, and we would take it for our own.
        try:
            with enter.signals_blocked():
                pid = os.fork()
                if pid == 0:
                    # Nothing is closed here: its first act closes all but its own.
                    witness = job_account.Witness(line_end.sock, account_end)
                    job_main.forked(begun, orders_end, witness, setup, child_is_empty)
        except OSError:
            child_is_empty.give_up()
            raise
        child_is_empty.wait()
        ours.pop_all()
    return Worker(pid=pid, orders=orders, line=line, account=account)


class Spare:
    """At most one worker, forked ahead."""

    def __init__(self, loop: Loop, setup: Setup, may_fork: Callable[[], bool]) -> None:
        """Begin with none; `may_fork` says, whenever one is to be forked, if it still is."""
        # Made here once, and not in each worker while somebody waits.
        codec.decoder_of(channel.Begin)
        self._loop = loop
        self._setup = setup
        self._may_fork = may_fork
        self._worker: Worker | None = None
        self._timer: Timer | None = None

    @property
    def pid(self) -> int:
        """Its process; 0 if there is none."""
        return self._worker.pid if self._worker is not None else 0

    def keep(self, jobs: int) -> None:
        """Have one soon, beside so many jobs; asked twice, at the earlier time."""
        timer = self._loop.after(FORK_AFTER_S[min(jobs, len(FORK_AFTER_S) - 1)], self._fork)
        if self._timer is not None:
            timer, later = sorted((self._timer, timer))
            later.cancel()
        self._timer = timer

    def _fork(self) -> None:
        self._timer = None
        if self._worker is None and self._may_fork():
            # Whoever comes next has a process forked in his own time, or hears why not.
            with contextlib.suppress(OSError):
                self._worker = fork(self._setup)

    def begin(self, job_id: str, grant: model.Grant | model.InspectGrant) -> Worker:
        """Give a job to the spare; to a new worker, if there is none, or it can't take it.

        Raises:
            OSError: no process, or no descriptors, to be had.
        """
        worker, self._worker = self._worker, None
        if worker is not None:
            try:
                worker.order(job_id, grant)
            except (channel.Closed, channel.TooLong):
                worker.end()
            else:
                return worker
        worker = fork(self._setup, job_main.Begun(job_id=job_id, grant=grant))
        worker.orders.close()
        return worker

    def end(self) -> None:
        """End the one there is."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()

    def lost(self, pid: int) -> None:
        """Take note that a process has ended, which may be the spare's."""
        if self._worker is not None and self._worker.pid == pid:
            log.warning("the spare process ended pid=%d", pid)
            self._worker.close()
            self._worker = None
