"""Storage that does not answer: processes in state D can't be killed, and nobody waits for them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from harness import images, processes, waiting
from harness.agent import Agent, Call, conversion
from harness.callers import ALICE
from harness.daemon import FRONT, JOB, QEMU_IMG, Daemon
from harness.mounts import Mounts
from policies import LIBRARY, Grant, Policy, Root

from convertd.v1 import convert_pb2 as pb

IMAGES: Final = Root("images", "{scratch}/images", mounts=True)
POLICY: Final = Policy(
    limits={"jobs": 1, "stall": "25 s"}, grants=[Grant(read=[LIBRARY, IMAGES], write=[IMAGES])]
)


PATIENCE_S: Final = 100.0
"""To freeze takes seconds where many write, and the clock of a stall runs meanwhile."""


@pytest.fixture
def disk(daemon: Daemon, scratch: Path) -> Iterator[Path]:
    """A file system of a test's own, in which the daemon may write."""
    with Mounts(scratch / "images") as made:
        yield made.on_a_loop("ext4", "disk", 300)
        daemon.await_idle()


@contextlib.contextmanager
def frozen(disk: Path, daemon: Daemon, library: Path) -> Iterator[Call]:
    """A conversion whose destination stops answering in the middle. Source: fsfreeze(8)."""
    request = conversion(
        library / "bulky.raw", disk / "dest.qcow2", rate_limit_bytes_per_second=images.MIB
    )
    call = daemon.agent(ALICE).convert(request)
    call.await_event(lambda event: event.progress.percent > 0)
    subprocess.run(["fsfreeze", "--freeze", str(disk)], check=True)
    try:
        pid = daemon.await_one(QEMU_IMG)
        waiting.until(lambda: hangs(pid), "qemu-img waits for its storage")
        yield call
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", str(disk)], check=True)


def hangs(pid: int) -> bool:
    """Whether a thread of a process is in state D, so that the process can't be killed."""
    return "D" in {processes.state(int(thread)) for thread in os.listdir(f"/proc/{pid}/task")}


def is_unkillable(agent: Agent) -> bool:
    """Whether the one job there is can't be ended."""
    return [job.state for job in agent.jobs()] == [pb.JOB_STATE_UNKILLABLE]


@pytest.mark.parametrize("how", ["stall", "cancel", "kill"])
def test_job_on_frozen_storage_keeps_its_slot_and_its_caller_gets_an_error(
    daemon: Daemon, disk: Path, library: Path, images_dir: Path, how: str
) -> None:
    """The list says why; when the storage answers, nothing is left, and the next one begins."""
    agent = daemon.agent(ALICE)
    with frozen(disk, daemon, library) as call:
        if how == "cancel":
            (job,) = agent.jobs()
            agent.cancel_job(job.job_id)
        if how == "kill":
            os.kill(daemon.await_one(JOB), signal.SIGKILL)
        expected = {"stall": "STALLED", "cancel": "CANCELLED_BY_CALLER", "kill": "OUT_OF_MEMORY"}
        assert call.refusal(PATIENCE_S).reason == expected[how]
        waiting.until(lambda: is_unkillable(agent), "the list says so", PATIENCE_S)
        dest = images_dir / "other.qcow2"
        other = agent.convert(conversion(library / "small.raw", dest))
        other.await_queued()
    other.result()
    assert images.identical(library / "small.raw", dest)
    waiting.until(lambda: not agent.jobs(), "no job is left")
    daemon.await_none(QEMU_IMG)
    assert os.listdir(disk) == ["lost+found"]


def test_job_on_frozen_storage_is_not_counted_as_a_call_of_the_next_front(
    daemon: Daemon, disk: Path, library: Path, images_dir: Path
) -> None:
    """Which counts its calls anew, and whose first is not refused as one that has a job already."""
    replace_front(daemon)
    with frozen(disk, daemon, library):
        replace_front(daemon)
        dest = images_dir / "another.qcow2"
        other = daemon.agent(ALICE).convert(conversion(library / "small.raw", dest))
        other.await_queued()
    other.result()
    daemon.await_none(QEMU_IMG)


def replace_front(daemon: Daemon) -> None:
    """Have another front, that nobody has called yet."""
    front = daemon.await_one(FRONT)
    os.kill(front, signal.SIGKILL)
    waiting.until(lambda: daemon.await_one(FRONT) != front, "another front")


def test_stop_does_not_wait_for_a_job_on_frozen_storage(
    daemon: Daemon, disk: Path, library: Path
) -> None:
    """Asked twice, the daemon ends at once; what it can't kill ends when the storage answers."""
    with frozen(disk, daemon, library) as call:
        left = daemon.await_one(QEMU_IMG)
        daemon.signal(signal.SIGTERM)
        daemon.await_notice("STOPPING=1")  # two signals at once may be one
        daemon.signal(signal.SIGTERM)
        assert call.end().status in {"CANCELLED", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
        assert daemon.wait() == 0
        assert os.path.exists(f"/proc/{left}")  # one thread of it is over, another is not
    daemon.check_nothing_is_left()
    daemon.start()


@pytest.fixture
def unanswered(daemon: Daemon, scratch: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A file system whose reads can't be interrupted, once the process beneath it is stopped.

    Of FUSE in FUSE: what the upper one has asked the lower one for, it can't answer.
    """
    beneath, lower = scratch / "images" / "beneath", scratch / "images" / "lower"
    for point in (beneath, lower):
        point.mkdir()
    server = subprocess.Popen(["bindfs", "-f", "-o", "direct_io", str(beneath), str(lower)])
    try:
        waiting.until(lambda: os.path.ismount(lower), "bindfs serves")
        with Mounts(scratch / "images") as made:
            yield made.by_fuse(lower, "upper", "-o", "direct_io"), server
            daemon.await_idle()
    finally:
        server.send_signal(signal.SIGCONT)
        server.terminate()
        server.wait()
    for point in (beneath, lower):
        shutil.rmtree(point)


def test_validation_on_frozen_storage_ends_with_a_stall_error(
    daemon: Daemon, unanswered: tuple[Path, subprocess.Popen[bytes]], images_dir: Path
) -> None:
    """What examines the image can't be killed either, and nobody waits for that."""
    upper, server = unanswered
    # Of many small tables, so that to follow them takes a while.
    options = ("-o", "cluster_size=512,preallocation=metadata")
    image = images.created(upper.with_name("beneath") / "source.qcow2", "qcow2", 128, *options)
    source = upper / image.name
    agent = daemon.agent(ALICE)
    call = agent.convert(
        conversion(source, images_dir / "dest", source_format="qcow2", validate_only=True)
    )
    waiting.until(lambda: "check" in qemu_img_argv(daemon), "the image is examined")
    server.send_signal(signal.SIGSTOP)
    try:
        pid = daemon.await_one(QEMU_IMG)
        waiting.until(lambda: hangs(pid), "qemu-img waits for its storage")
        # Most times the kernel does not let it be killed; the caller is told in either case.
        assert call.refusal(PATIENCE_S).reason == "STALLED"
    finally:
        server.send_signal(signal.SIGCONT)
    daemon.await_none(QEMU_IMG)


def qemu_img_argv(daemon: Daemon) -> list[str]:
    """What the one qemu-img was started with."""
    with contextlib.suppress(OSError):
        return processes.argv(daemon.await_one(QEMU_IMG))
    return []
