"""When the next job is preforked: once, however often it is asked for, and at the earliest time."""

from __future__ import annotations

import time
from typing import Final

import pytest

from convertd_daemon import loop
from convertd_daemon.job import process
from convertd_daemon.sandbox.setup import Setup

LONE_S: Final = process.FORK_AFTER_S[1]
"""The longest that it takes: beside a job that has the machine to itself."""


class Asked:
    """A preforked job that may never be forked, and when it would have been, in s from now."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.loop = loop.Loop()
        setup = Setup(path="/usr/bin/qemu-img", identity=None, seccomp=b"")
        self.preforked = process.PreforkedJob(self.loop, setup, self.may_fork)
        self.began = time.monotonic()

    def may_fork(self) -> bool:
        """Take note of the time."""
        self.times.append(time.monotonic() - self.began)
        return False

    def run(self) -> list[float]:
        """Run until all that was asked for by now must have come."""
        self.loop.after(LONE_S, self.loop.stop)
        self.loop.run()
        return self.times


@pytest.mark.parametrize("jobs", range(4))
def test_preforked_job_is_forked_once_at_the_set_time(jobs: int) -> None:
    """By how many jobs there are."""
    asked = Asked()
    asked.preforked.schedule_fork(jobs)
    (time_s,) = asked.run()
    assert time_s >= process.FORK_AFTER_S[min(jobs, 2)]


@pytest.mark.parametrize("jobs", [(1, 0), (0, 1), (1, 2), (2, 1), (1, 1), (2, 2, 2)])
def test_preforked_job_is_forked_at_the_earlier_of_two_times(jobs: tuple[int, ...]) -> None:
    """The time set for a job that has ended would lie in the midst of the next one."""
    asked = Asked()
    for count in jobs:
        asked.preforked.schedule_fork(count)
    seen_by_then: list[int] = []
    earliest_s = min(process.FORK_AFTER_S[count] for count in jobs)
    asked.loop.after(earliest_s, lambda: seen_by_then.append(len(asked.times)))
    assert len(asked.run()) == 1
    assert seen_by_then == [1]


def test_preforked_job_is_not_postponed_by_consecutive_jobs() -> None:
    """A busy daemon would never have one."""
    asked = Asked()
    asked.preforked.schedule_fork(1)
    for part in range(1, 4):
        asked.loop.after(LONE_S * part / 4, lambda: asked.preforked.schedule_fork(1))
    assert len(asked.run()) == 1


def test_preforked_job_can_be_requested_again() -> None:
    """Forked, or not allowed to be: later it is wanted again."""
    asked = Asked()
    asked.preforked.schedule_fork(0)
    asked.loop.after(LONE_S / 2, lambda: asked.preforked.schedule_fork(0))
    _, second_s = asked.run()
    assert second_s >= LONE_S / 2
