"""A caller in the queue is sent its position: at once, and as it moves up, but not at each step."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator

import grants
import pytest

from convertd_core import values
from convertd_daemon import loop
from convertd_daemon.broker import connections, jobs, queue
from convertd_daemon.sandbox import closer
from convertd_daemon.service import audit

RULES = grants.Rules(roots=(grants.files("/images"),))


class Waiting:
    """A queue, and what its callers were told. Nobody listens while `deaf`."""

    def __init__(self, connection: connections.Connection) -> None:
        self.loop = loop.Loop()
        self.jobs = jobs.Jobs(grants.limits(jobs=9, jobs_per_user=9, queue=100, queue_per_user=100))
        lanes = (self.jobs.conversions, self.jobs.inspections)
        self.positions = queue.Positions(self.loop, lanes, self._send)
        self.sent_position: list[tuple[int, int]] = []
        self.deaf = False
        self._is_awaited = False
        self._connection = connection

    def join(self, number: int, *, validate_only: bool = False) -> None:
        """Queue one more."""
        request = dataclasses.replace(
            grants.request("/images/a", f"/images/{number}"), validate_only=validate_only
        )
        asked = audit.conversion(request, self._connection.caller)
        self.jobs.add(number, self._connection, RULES.convert(request), asked)
        self.positions.notify()

    def start(self, count: int) -> None:
        """Start the first ones, one after the other: everybody moves up."""
        for _ in range(count):
            assert self.jobs.conversions.next() is not None
            self.positions.notify()

    def await_telling(self) -> None:
        """Serve until somebody is told."""
        self._is_awaited = True
        self.loop.run()

    def _send(self, job: jobs.Job) -> bool:
        if self.deaf:
            return False
        self.sent_position.append((job.call, job.position))
        if self._is_awaited:
            self.loop.stop()
        return True


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    """An empty one."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = connections.Connections(
            values.DEFAULT_LIMITS, closer.Closer(loop.Loop().after)
        ).admit(ours)
        assert connection is not None
        yield Waiting(connection)


def test_new_queued_job_is_sent_its_position_at_once(waiting: Waiting) -> None:
    """Also when somebody was told just before."""
    for number in (1, 2, 3):
        waiting.join(number)
    assert waiting.sent_position == [(1, 1), (2, 2), (3, 3)]


def test_position_changes_are_combined_into_the_last_one(waiting: Waiting) -> None:
    """One message for two steps."""
    for number in (1, 2, 3):
        waiting.join(number)
    waiting.sent_position.clear()
    waiting.start(2)
    assert waiting.sent_position == []
    waiting.await_telling()
    assert waiting.sent_position == [(3, 1)]


def test_queue_positions_of_inspections_are_counted_separately(waiting: Waiting) -> None:
    """From one, in each of the two queues."""
    waiting.join(1)
    waiting.join(2, validate_only=True)
    assert waiting.sent_position == [(1, 1), (2, 1)]


def test_position_change_after_a_quiet_time_is_sent_at_once(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a short queue nobody notices that positions are held back."""
    monkeypatch.setattr(queue, "AGAIN_S", 0.0)
    waiting.join(1)
    waiting.join(2)
    waiting.sent_position.clear()
    waiting.start(1)
    assert waiting.sent_position == [(2, 1)]


def test_position_is_sent_when_a_busy_front_has_caught_up(waiting: Waiting) -> None:
    """The front is behind: it will be told when it has caught up."""
    waiting.deaf = True
    waiting.join(1)
    waiting.join(2)
    assert waiting.sent_position == []
    waiting.deaf = False
    waiting.positions.notify()
    assert waiting.sent_position == [(1, 1), (2, 2)]


def test_job_that_left_the_queue_is_sent_no_position(waiting: Waiting) -> None:
    """Those behind move up."""
    for number in (1, 2, 3):
        waiting.join(number)
    waiting.sent_position.clear()
    job = waiting.jobs.by_call(1)
    assert job is not None
    waiting.jobs.remove(job)
    waiting.start(1)
    waiting.await_telling()
    assert waiting.sent_position == [(3, 1)]
