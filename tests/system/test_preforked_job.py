"""The process that is forked ahead of the next job: what it holds, and that it stands in no way."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Final

import pytest
from harness import images, processes, waiting
from harness.agent import conversion
from harness.callers import ALICE, Caller
from harness.daemon import JOB, PREFORKED_JOB, Daemon
from harness.fixtures import MakeDaemon
from policies import IMAGES, LIBRARY, Grant, Policy

POLICY: Final = Policy(
    limits={"jobs": 2, "jobs_per_user": 2}, grants=[Grant(read=[LIBRARY, IMAGES], write=[IMAGES])]
)

STANDARD: Final = {0, 1, 2}
MANY_GROUPS: Final = 40_000
"""Their numbers alone are more than a message holds."""


def convert(daemon: Daemon, library: Path, images_dir: Path, caller: Caller = ALICE) -> None:
    """Convert an image, and see that it is one."""
    dest = images_dir / "dest.qcow2"
    daemon.agent(caller).convert(conversion(library / "small.raw", dest)).result()
    assert images.identical(library / "small.raw", dest)
    dest.unlink()


def test_job_runs_in_the_process_that_was_preforked(
    daemon: Daemon, library: Path, images_dir: Path
) -> None:
    """And there is another one soon."""
    preforked = daemon.await_one(PREFORKED_JOB)
    convert(daemon, library, images_dir)
    assert f" pid={preforked}\n" in daemon.log
    waiting.until(lambda: not processes.exists(preforked), "the job is gone")
    assert daemon.await_one(PREFORKED_JOB) != preforked


def test_preforked_job_has_only_its_own_channels_open(daemon: Daemon) -> None:
    """Three, of which no other process has that end. No connection, no job, no image."""
    connected = daemon.agent(ALICE)
    connected.access()
    opened = processes.descriptors(daemon.await_one(PREFORKED_JOB))
    own = {number: name for number, name in opened.items() if number not in STANDARD}
    kinds = sorted(name.partition(":")[0] for name in own.values())
    assert kinds == ["pipe", "socket", "socket"]
    sockets = {name for name in own.values() if name.startswith("socket")}
    assert sockets.isdisjoint(processes.descriptors(daemon.pid).values())


def test_consecutive_jobs_get_only_the_rights_of_their_own_caller(
    daemon: Daemon, library: Path, images_dir: Path
) -> None:
    """Nothing of one order stays for the next: who is not in the policy is refused as ever."""
    convert(daemon, library, images_dir)
    stranger = daemon.agent(Caller(uid=4999, gid=4999))
    dest = images_dir / "dest.qcow2"
    refusal = stranger.convert(conversion(library / "small.raw", dest)).refusal()
    assert refusal.status == "PERMISSION_DENIED"
    assert not os.listdir(images_dir)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_preforked_job_does_not_delay_the_next_job(
    daemon: Daemon, library: Path, images_dir: Path, number: signal.Signals
) -> None:
    """The next job has a process forked in its own time."""
    preforked = daemon.await_one(PREFORKED_JOB)
    os.kill(preforked, number)
    waiting.until(lambda: not processes.exists(preforked), "the preforked job is gone")
    convert(daemon, library, images_dir)
    daemon.await_idle()


def test_stopped_preforked_job_is_ended_with_its_job(
    daemon: Daemon, library: Path, images_dir: Path
) -> None:
    """It takes the order and does nothing; its caller cancels, and the place is free again."""
    preforked = daemon.await_one(PREFORKED_JOB)
    os.kill(preforked, signal.SIGSTOP)
    granted = daemon.log.count("granted job=")
    call = daemon.agent(ALICE).convert(conversion(library / "small.raw", images_dir / "dest.qcow2"))
    waiting.until(lambda: daemon.log.count("granted job=") > granted, "the job is granted")
    call.cancel()
    assert call.end().status == "CANCELLED"
    waiting.until(lambda: not processes.exists(preforked), "the job is gone")
    convert(daemon, library, images_dir)


def test_assignment_too_large_for_a_message_runs_in_a_new_process(
    make_daemon: MakeDaemon, library: Path, images_dir: Path
) -> None:
    """By a process that was forked with it."""
    daemon = make_daemon(POLICY)
    daemon.start()
    groups = tuple(range(100_000, 100_000 + MANY_GROUPS))
    caller = Caller(uid=ALICE.uid, gid=ALICE.gid, groups=groups)
    preforked = daemon.await_one(PREFORKED_JOB)
    convert(daemon, library, images_dir, caller)
    assert f" pid={preforked}\n" not in daemon.log
    daemon.await_idle()


def test_preforked_job_is_absent_while_every_job_slot_is_taken(
    daemon: Daemon, library: Path, images_dir: Path
) -> None:
    """No job could begin; when one ends, the next is preforked again."""
    slow = [
        daemon.agent(ALICE).convert(
            conversion(
                library / "bulky.raw",
                images_dir / f"slow-{number}",
                rate_limit_bytes_per_second=images.MIB,
            )
        )
        for number in range(2)
    ]
    for call in slow:
        call.await_started()
    waiting.until(lambda: len(daemon.processes(JOB)) == 2, "both places are taken")
    for call in slow:
        call.cancel()
        call.end()
    daemon.await_idle()


def test_preforked_job_ends_with_a_killed_broker(make_daemon: MakeDaemon) -> None:
    """As every process of the daemon does."""
    daemon = make_daemon(POLICY)
    daemon.start()
    preforked = daemon.await_one(PREFORKED_JOB)
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    waiting.until(lambda: not processes.exists(preforked), "the preforked job is gone")
