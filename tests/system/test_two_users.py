"""Two users who want the same destination: between them the kernel alone answers.

What one asks for is no lock on a name, and nothing that another could learn of.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest
from harness import images
from harness.agent import Call, conversion
from harness.callers import ALICE, BOB, owner_of
from harness.daemon import QEMU_IMG, Daemon
from loop_devices import Devices
from policies import LIBRARY, VOLUMES, Grant, Policy, Root

from convertd.v1 import convert_pb2 as pb

HOMES: Final = Root("homes", "{scratch}/homes", access="caller")
SHARED: Final = Root("shared", "{scratch}/shared")
POLICY: Final = Policy(
    limits={"jobs": 4, "jobs_per_user": 1},
    grants=[Grant(users=[1234, 1235], read=[LIBRARY], write=[HOMES, SHARED, VOLUMES])],
)

MIB: Final = 1024 * 1024


@pytest.fixture
def source(library: Path) -> Path:
    """A raw image of 8 MiB."""
    return library / "small.raw"


@pytest.fixture
def bobs(daemon: Daemon, scratch: Path) -> Path:
    """Bob's own directory, which nobody else may enter."""
    assert daemon.is_running
    directory = scratch / "homes" / "bob"
    directory.mkdir(mode=0o700, exist_ok=True)
    os.chown(directory, BOB.uid, BOB.gid)
    return directory


def begin(daemon: Daemon, source: Path, dest: Path, dest_format: str = "qcow2") -> Call:
    """Have Alice convert for a minute or so; it runs or waits."""
    slow = conversion(source, dest, dest_format=dest_format, rate_limit_bytes_per_second=MIB)
    call = daemon.agent(ALICE).convert(slow)
    call.await_event(lambda event: bool(event.progress.job_id or event.started.job_id))
    return call


def test_queued_job_does_not_block_a_directory_its_caller_may_not_enter(
    daemon: Daemon, library: Path, scratch: Path, source: Path, bobs: Path
) -> None:
    """Alice may not even enter it: her job fails as soon as it runs."""
    dest = bobs / "disk.qcow2"
    running = begin(daemon, library / "bulky.raw", scratch / "shared" / "alices.qcow2")
    running.await_started()
    waiting = begin(daemon, source, dest)
    assert daemon.agent(BOB).convert(conversion(source, dest)).result().published
    assert owner_of(dest)[0] == BOB.uid
    running.cancel()
    assert waiting.refusal().reason == "ACCESS_REFUSED"
    daemon.await_idle()


def test_same_destination_of_two_users_goes_to_the_first_job_to_finish(
    daemon: Daemon, library: Path, scratch: Path, source: Path
) -> None:
    """The other is told what linkat(2) says, at the end. Meanwhile no answer tells of a job."""
    dest = scratch / "shared" / "disk.qcow2"
    first = begin(daemon, library / "slow.raw", dest)
    first.await_started()
    bob = daemon.agent(BOB)
    with daemon.stopped(QEMU_IMG):
        assert bob.convert(conversion(source, dest)).result().published
        refusal = bob.convert(conversion(source, dest)).refusal()
    assert (refusal.status, refusal.reason) == ("ALREADY_EXISTS", "DEST_EXISTS")
    assert owner_of(dest)[0] == BOB.uid
    ended = first.refusal()
    assert (ended.status, ended.reason) == ("ALREADY_EXISTS", "DEST_EXISTS")
    assert images.identical(dest, source)
    daemon.await_idle()


def test_device_is_locked_by_the_running_job_and_not_by_queued_ones(
    daemon: Daemon, volumes: Devices, library: Path, scratch: Path, source: Path
) -> None:
    """By O_EXCL: a second job gets EBUSY from the kernel, whosever it is."""
    volume = volumes.add("of-both", 16 * MIB)
    running = begin(daemon, library / "bulky.raw", scratch / "shared" / "alices.qcow2")
    running.await_started()
    waiting = begin(daemon, source, volume, "raw")
    bob = daemon.agent(BOB)
    assert bob.convert(conversion(source, volume, dest_format="raw")).result().published
    running.cancel()
    waiting.await_started()
    refusal = bob.convert(conversion(source, volume, dest_format="raw")).refusal()
    assert (refusal.status, refusal.reason) == ("FAILED_PRECONDITION", "IMAGE_IN_USE")
    waiting.cancel()
    daemon.await_idle()
    assert bob.convert(conversion(source, volume, dest_format="raw")).result().published


def test_second_job_of_one_user_for_the_same_destination_is_refused_at_once(
    daemon: Daemon, library: Path, scratch: Path, source: Path
) -> None:
    """Whoever comes second would only lose what it did; and the job list is the caller's own."""
    dest = scratch / "shared" / "twice.qcow2"
    first = begin(daemon, library / "bulky.raw", dest)
    first.await_started()
    refusal = daemon.agent(ALICE).convert(conversion(source, dest)).refusal()
    assert (refusal.status, refusal.reason) == ("ABORTED", "DEST_BUSY")
    jobs = daemon.agent(ALICE).jobs()
    assert [job.state for job in jobs] == [pb.JOB_STATE_RUNNING]
    first.cancel()
    daemon.await_idle()
