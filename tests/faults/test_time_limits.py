"""Conversions that stand still, that take too long, and that don't listen."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Final

import pytest
from harness import processes, waiting
from harness.agent import conversion
from harness.callers import ALICE
from harness.daemon import JOB, QEMU_IMG, Daemon
from harness.fixtures import MakeDaemon
from policies import IMAGES, LIBRARY, Grant, Policy

POLICY: Final = Policy(grants=[Grant(read=[LIBRARY], write=[IMAGES])])

MIB: Final = 1024 * 1024


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> Daemon:
    """A daemon that gives a conversion four seconds of standstill, and an hour in all."""
    return started(make_daemon, "4 s", "1 h")


def started(make_daemon: MakeDaemon, stall: str, duration: str) -> Daemon:
    """A daemon with these limits."""
    one = make_daemon(POLICY.with_limits(stall=stall, duration=duration))
    one.start()
    return one


def test_stalled_conversion_is_ended(daemon: Daemon, library: Path, images_dir: Path) -> None:
    """No per cent, no block, no processor time: a qemu-img that was stopped moves nothing."""
    request = conversion(
        library / "bulky.raw", images_dir / "dest.qcow2", rate_limit_bytes_per_second=MIB
    )
    call = daemon.agent(ALICE).convert(request)
    call.await_event(lambda event: event.progress.percent > 0)
    os.kill(daemon.await_one(QEMU_IMG), signal.SIGSTOP)
    refusal = call.refusal()
    assert (refusal.status, refusal.reason) == ("DEADLINE_EXCEEDED", "STALLED")
    assert refusal.metadata == {"stall_s": "4.0"}
    daemon.await_idle()
    assert os.listdir(images_dir) == []


def test_slow_conversion_that_makes_progress_is_not_ended(
    make_daemon: MakeDaemon, library: Path, images_dir: Path
) -> None:
    """At 1 MiB/s each per cent of it takes more than half a second, the whole over a minute."""
    daemon = started(make_daemon, "10 s", "1 h")
    request = conversion(
        library / "bulky.raw", images_dir / "dest.qcow2", rate_limit_bytes_per_second=MIB
    )
    call = daemon.agent(ALICE).convert(request)
    call.await_event(lambda event: event.progress.elapsed_seconds > 15)
    assert [job.uid for job in daemon.agent(ALICE).jobs()] == [ALICE.uid]
    call.cancel()
    assert call.end().status == "CANCELLED"


def test_conversion_is_ended_at_its_time_limit(
    make_daemon: MakeDaemon, library: Path, images_dir: Path
) -> None:
    """Though it moves."""
    daemon = started(make_daemon, "5 min", "1 s")
    request = conversion(
        library / "bulky.raw", images_dir / "dest.qcow2", rate_limit_bytes_per_second=MIB
    )
    refusal = daemon.agent(ALICE).convert(request).refusal()
    assert (refusal.status, refusal.reason) == ("DEADLINE_EXCEEDED", "DURATION_EXCEEDED")
    assert refusal.metadata == {"duration_s": "1.0"}
    daemon.await_idle()
    assert os.listdir(images_dir) == []


def test_job_that_ignores_sigterm_is_killed(
    daemon: Daemon, library: Path, images_dir: Path
) -> None:
    """First it is asked, by SIGTERM; a process that was stopped can't hear that."""
    request = conversion(
        library / "bulky.raw", images_dir / "dest.qcow2", rate_limit_bytes_per_second=MIB
    )
    call = daemon.agent(ALICE).convert(request)
    started = call.await_started()
    daemon.await_one(QEMU_IMG)
    job = daemon.await_one(JOB)
    os.kill(job, signal.SIGSTOP)
    waiting.until(lambda: processes.state(job) == "T", "the job is stopped")
    daemon.agent(ALICE).cancel_job(started.job_id)
    refusal = call.refusal()
    assert (refusal.status, refusal.reason) == ("CANCELLED", "CANCELLED_BY_CALLER")
    daemon.await_idle()
    assert os.listdir(images_dir) == []
    assert daemon.agent(ALICE).jobs() == []
