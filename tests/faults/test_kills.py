"""kill -9 of each process in the middle of a conversion: nothing to be seen, and nothing left."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from harness import images, processes, waiting
from harness.agent import Agent, Call, conversion
from harness.callers import ALICE, BOB, owner_of
from harness.daemon import FRONT, JOB, QEMU_IMG, Daemon
from harness.fixtures import MakeDaemon
from harness.mounts import Mounts
from harness.tracing import Tracer
from policies import LIBRARY, Grant, Policy, Root

from convertd.v1 import convert_pb2 as pb

IMAGES: Final = Root("images", "{scratch}/images", mounts=True)
POLICY: Final = Policy(grants=[Grant(read=[LIBRARY, IMAGES], write=[IMAGES])])

MIB: Final = 1024 * 1024

DELAY_MS: Final = 500
"""How long strace holds a job before each renameat2(2)."""


@pytest.fixture
def alice(daemon: Daemon) -> Agent:
    """Calls as uid 1234."""
    return daemon.agent(ALICE)


def begin(daemon: Daemon, library: Path, dest: Path) -> Call:
    """Begin a conversion that takes a minute, and wait until qemu-img has written something."""
    request = conversion(library / "bulky.raw", dest, rate_limit_bytes_per_second=MIB)
    call = daemon.agent(ALICE).convert(request)
    call.await_event(lambda event: event.progress.percent > 0)
    return call


def check_serves(daemon: Daemon, library: Path, directory: Path) -> None:
    """See that nothing is visible, and that the next conversion is done."""
    assert os.listdir(directory) == []
    dest = directory / "next.qcow2"
    daemon.agent(ALICE).convert(conversion(library / "small.raw", dest)).result()
    assert owner_of(dest) == (ALICE.uid, ALICE.gid, 0o600)
    assert images.identical(library / "small.raw", dest)


# --- each of them -------------------------------------------------------------------------------


def test_killed_client_cancels_its_job(daemon: Daemon, library: Path, images_dir: Path) -> None:
    """The kernel closes its connection, and that is the cancel."""
    begin(daemon, library, images_dir / "dest.qcow2")
    daemon.kill_agent(ALICE)
    daemon.await_idle()
    check_serves(daemon, library, images_dir)


def test_killed_front_cancels_all_jobs_and_is_replaced(
    daemon: Daemon, library: Path, images_dir: Path
) -> None:
    """Its callers see a broken connection, and no reason: it is the transport's."""
    call = begin(daemon, library, images_dir / "dest.qcow2")
    front = daemon.await_one(FRONT)
    os.kill(front, signal.SIGKILL)
    ended = call.end()
    assert (ended.status, ended.details) == ("UNAVAILABLE", ())
    daemon.await_idle()
    check_serves(daemon, library, images_dir)
    assert daemon.await_one(FRONT) != front


def test_killed_job_ends_its_qemu_img(
    daemon: Daemon, alice: Agent, library: Path, images_dir: Path
) -> None:
    """By PDEATHSIG. The caller is told what most likely happened: the kernel wanted memory."""
    call = begin(daemon, library, images_dir / "dest.qcow2")
    os.kill(daemon.await_one(JOB), signal.SIGKILL)
    refusal = call.refusal()
    assert (refusal.status, refusal.reason) == ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")
    daemon.await_idle()
    assert alice.jobs() == []
    check_serves(daemon, library, images_dir)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, "OUT_OF_MEMORY"),
        (signal.SIGABRT, "OUT_OF_MEMORY"),
        (signal.SIGSEGV, "CONVERSION_FAILED"),
        (signal.SIGTERM, "CONVERSION_FAILED"),
    ],
)
def test_qemu_img_killed_by_a_signal_publishes_nothing(
    daemon: Daemon, library: Path, images_dir: Path, number: signal.Signals, reason: str
) -> None:
    """And the caller is told."""
    call = begin(daemon, library, images_dir / "dest.qcow2")
    os.kill(daemon.await_one(QEMU_IMG), number)
    assert call.refusal().reason == reason
    daemon.await_idle()
    check_serves(daemon, library, images_dir)


def test_killed_broker_ends_all_processes_and_the_next_start_works(
    make_daemon: MakeDaemon, library: Path, images_dir: Path
) -> None:
    """The next start finds a dead socket, clears it, and serves."""
    daemon = make_daemon(POLICY)
    daemon.start()
    call = begin(daemon, library, images_dir / "dest.qcow2")
    session = daemon.pid
    daemon.signal(signal.SIGKILL)
    assert daemon.wait() == -signal.SIGKILL
    waiting.until(lambda: not living(session), "no process of that daemon")
    assert call.end().status == "UNAVAILABLE"
    assert daemon.socket.exists()
    daemon.start()
    check_serves(daemon, library, images_dir)


def living(session: int) -> list[processes.Process]:
    """What is left of a daemon. Its orphans' zombies are not its own."""
    return [process for process in processes.of_session(session) if not process.is_over]


# --- at every moment ----------------------------------------------------------------------------

MOMENTS: Final = (
    pb.PHASE_PREPARING,
    pb.PHASE_CONVERTING,
    pb.PHASE_FLUSHING,
    pb.PHASE_PUBLISHING,
)


@pytest.mark.parametrize("moment", MOMENTS, ids=pb.Phase.Name)
@pytest.mark.parametrize("name", [JOB, QEMU_IMG, FRONT])
def test_kill_in_any_phase_leaves_a_whole_destination_or_none(
    daemon: Daemon, library: Path, images_dir: Path, name: str, moment: pb.Phase.ValueType
) -> None:
    """Killed as soon as the caller hears of a phase; some of them are too late, as they may be."""
    dest = images_dir / "dest.qcow2"
    call = daemon.agent(ALICE).convert(conversion(library / "small.raw", dest))
    killed: set[int] = set()
    for event in call.events():
        if event.progress.phase == moment:
            killed = {process.pid for process in daemon.processes(name)}
            for pid in killed:
                kill(pid)
            break
    call.end()
    waiting.until(lambda: not any(map(processes.exists, killed)), "what was killed is gone")
    daemon.await_idle()
    daemon.await_one(FRONT)
    if name == FRONT:
        daemon.kill_agent(ALICE)  # whose connection may not know yet that nobody is at its end
    if dest.exists():
        assert owner_of(dest) == (ALICE.uid, ALICE.gid, 0o600)
        assert images.identical(library / "small.raw", dest)
        dest.unlink()
    check_serves(daemon, library, images_dir)


def kill(pid: int) -> None:
    """Kill a process that may have ended by itself."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


# --- where the result has a name from the start -------------------------------------------------


@pytest.fixture(scope="module")
def by_fuse(mounts: Mounts, scratch: Path, daemon: Daemon) -> Iterator[Path]:
    """A directory by FUSE, which has no O_TMPFILE, in the root `images`."""
    assert daemon.is_running
    beneath = scratch / "beneath"
    beneath.mkdir()
    inside = scratch / "images" / "by-fuse"
    inside.mkdir()
    with Mounts(inside) as made:
        yield made.by_fuse(beneath, "mounted")
    assert mounts is not None


def test_named_temporary_of_a_killed_job_is_removed_by_the_next_job(
    daemon: Daemon, library: Path, by_fuse: Path
) -> None:
    """It is nobody's result: hidden, locked by nobody, and gone with the next conversion."""
    call = begin(daemon, library, by_fuse / "dest.qcow2")
    os.kill(daemon.await_one(JOB), signal.SIGKILL)
    assert call.refusal().reason == "OUT_OF_MEMORY"
    daemon.await_idle()
    (left,) = [name for name in os.listdir(by_fuse) if not name.startswith(".fuse_hidden")]
    assert left.startswith(".convertd-")
    dest = by_fuse / "next.qcow2"
    daemon.agent(ALICE).convert(conversion(library / "small.raw", dest)).result()
    waiting.until(lambda: os.listdir(by_fuse) == ["next.qcow2"], "the result alone")
    dest.unlink()


@pytest.mark.parametrize("name", [QEMU_IMG, FRONT])
def test_named_temporary_is_removed_by_a_surviving_job(
    daemon: Daemon, library: Path, by_fuse: Path, name: str
) -> None:
    """Whoever else dies."""
    call = begin(daemon, library, by_fuse / "dest.qcow2")
    os.kill(daemon.await_one(name), signal.SIGKILL)
    call.end()
    daemon.await_idle()
    # libfuse hides what is removed while it is open, until it hears of the last close.
    waiting.until(lambda: os.listdir(by_fuse) == [], "no file")


# --- in the instants of overwriting -------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "is_new"),
    [("renameat2", False), ("unlinkat", True)],
    ids=["before-the-exchange", "after-the-exchange"],
)
def test_job_killed_during_an_overwrite_leaves_whole_files(
    daemon: Daemon, library: Path, images_dir: Path, call: str, *, is_new: bool
) -> None:
    """One has the name, the other a temporary one: the next overwriting job removes that."""
    source, dest = library / "small.raw", images_dir / "dest.raw"
    dest.write_bytes(b"the old one")
    os.chown(dest, ALICE.uid, ALICE.gid)
    request = conversion(source, dest, dest_format="raw", overwrite=True)
    with Tracer(daemon.traced(), f"{call}:signal=KILL:when=1"):
        assert daemon.agent(ALICE).convert(request).refusal().reason == "OUT_OF_MEMORY"
        daemon.await_idle()
    (left,) = [images_dir / name for name in os.listdir(images_dir) if name != dest.name]
    new, old = (dest, left) if is_new else (left, dest)
    assert images.identical(source, new)
    assert old.read_bytes() == b"the old one"
    assert daemon.agent(ALICE).convert(request).result().replaced
    assert os.listdir(images_dir) == [dest.name]
    assert images.identical(source, dest)


def test_file_of_another_user_left_by_a_killed_exchange_is_kept(
    daemon: Daemon, library: Path, images_dir: Path
) -> None:
    """It came between check and exchange. What was not judged replaceable is never removed."""
    source, dest = library / "small.raw", images_dir / "dest.raw"
    for name, owner, data in (("dest.raw", ALICE, b"old"), ("bobs", BOB, b"precious")):
        (images_dir / name).write_bytes(data)
        os.chown(images_dir / name, owner.uid, owner.gid)
    request = conversion(source, dest, dest_format="raw", overwrite=True)
    with Tracer(daemon.traced(), f"renameat2:delay_enter={DELAY_MS * 1000}"):
        call = daemon.agent(ALICE).convert(request)
        job = daemon.await_one(JOB)
        waiting.until(lambda: processes.is_about_to_rename(job), "the job is about to exchange")
        (images_dir / "bobs").rename(dest)
        waiting.until(lambda: owner_of(dest)[0] == ALICE.uid, "the names are exchanged")
        os.kill(job, signal.SIGKILL)
        call.end()
        daemon.await_idle()
    (left,) = [images_dir / name for name in os.listdir(images_dir) if name != dest.name]
    assert left.read_bytes() == b"precious"
    for _ in range(2):
        assert daemon.agent(ALICE).convert(request).result().replaced
    assert left.read_bytes() == b"precious"
    assert owner_of(left)[0] == BOB.uid
