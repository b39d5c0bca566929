"""SIGSTOP and SIGKILL of each process at each stage: a result is whole or absent.

A process that was stopped hears nothing, no signal but one. Then it goes on, and the conversion
ends as if nothing had been; or it is killed as it is.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from harness import images, processes, waiting
from harness.agent import Call, conversion
from harness.callers import ALICE, owner_of
from harness.daemon import FRONT, JOB, QEMU_IMG, Daemon
from harness.fixtures import MakeDaemon
from policies import IMAGES, LIBRARY, Grant, Policy

from convertd.v1 import convert_pb2 as pb

POLICY: Final = Policy(limits={"jobs": 1}, grants=[Grant(read=[LIBRARY], write=[IMAGES])])

CLIENT: Final = "client"
BROKER: Final = "broker"

STAGES: Final = (
    pb.PHASE_QUEUED,
    pb.PHASE_PREPARING,
    pb.PHASE_CONVERTING,
    pb.PHASE_FLUSHING,
    pb.PHASE_VERIFYING,
    pb.PHASE_PUBLISHING,
)

AT: Final = pytest.mark.parametrize("stage", STAGES, ids=pb.Phase.Name)


@contextlib.contextmanager
def at_stage(
    daemon: Daemon, library: Path, dest: Path, stage: pb.Phase.ValueType
) -> Iterator[Call]:
    """A conversion of which the caller has just heard that it is there, or beyond."""
    agent = daemon.agent(ALICE)
    before = []
    if stage == pb.PHASE_QUEUED:
        before_dest, rate = dest.with_name("before.raw"), images.MIB
        bulky = conversion(
            library / "bulky.raw", before_dest, dest_format="raw", rate_limit_bytes_per_second=rate
        )
        before.append(agent.convert(bulky))
        before[0].await_started()
    call = agent.convert(conversion(library / "small.raw", dest, verify=True))
    # Of progress the newest is told: a phase that is short may be missed.
    next((event for event in call.events() if event.progress.phase >= stage), None)
    for one in before:
        one.cancel()
    yield call


def pids(daemon: Daemon, name: str) -> list[int]:
    """Whom a name means, of those that live."""
    if name == BROKER:
        return [daemon.pid]
    if name == CLIENT:
        return [daemon.agent(ALICE).pid]
    return [process.pid for process in daemon.processes(name)]


def send(pid: int, number: signal.Signals) -> None:
    """Signal a process that may have ended by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def stop(pid: int) -> None:
    """Stop a process, and wait until it has."""
    send(pid, signal.SIGSTOP)
    waiting.until(lambda: processes.state(pid) in {"T", "Z", ""}, "it has stopped, or ended")


def check_serves(daemon: Daemon, library: Path, directory: Path) -> None:
    """See that a result is whole or absent, nothing else is there, and the next one is done."""
    waiting.until(
        lambda: not (daemon.processes(QEMU_IMG) or daemon.processes(JOB)), "no job is left"
    )
    assert set(os.listdir(directory)) <= {"dest.qcow2"}
    for name in (*os.listdir(directory), "next.qcow2"):
        if name == "next.qcow2":
            request = conversion(library / "small.raw", directory / name)
            daemon.agent(ALICE).convert(request).result()
        assert owner_of(directory / name) == (ALICE.uid, ALICE.gid, 0o600)
        assert images.identical(library / "small.raw", directory / name)
    waiting.until(lambda: not daemon.agent(ALICE).jobs(), "no job is listed")


@pytest.mark.parametrize("name", [CLIENT, FRONT, BROKER, JOB, QEMU_IMG])
@AT
def test_process_resumed_after_sigstop_leaves_a_correct_result(
    daemon: Daemon, library: Path, images_dir: Path, name: str, stage: pb.Phase.ValueType
) -> None:
    """Whoever waits for it waits; the others do what they can, and nobody takes it for dead."""
    with at_stage(daemon, library, images_dir / "dest.qcow2", stage) as call:
        stopped = pids(daemon, name)
        for pid in stopped:
            stop(pid)
        for pid in stopped:
            send(pid, signal.SIGCONT)
        assert call.result().verified
    assert os.listdir(images_dir) == ["dest.qcow2"]
    check_serves(daemon, library, images_dir)


@pytest.mark.parametrize("name", [CLIENT, FRONT, JOB, QEMU_IMG])
@AT
def test_process_killed_while_stopped_leaves_a_whole_result_or_none(
    daemon: Daemon, library: Path, images_dir: Path, name: str, stage: pb.Phase.ValueType
) -> None:
    """The kernel does what it can't do itself."""
    with at_stage(daemon, library, images_dir / "dest.qcow2", stage) as call:
        for pid in pids(daemon, name):
            stop(pid)
            if name == CLIENT:
                daemon.kill_agent(ALICE)
            else:
                send(pid, signal.SIGKILL)
        if name != CLIENT:
            call.end()
    daemon.await_one(FRONT)
    check_serves(daemon, library, images_dir)


@AT
def test_broker_killed_while_stopped_leaves_a_whole_result_or_none(
    make_daemon: MakeDaemon, library: Path, images_dir: Path, stage: pb.Phase.ValueType
) -> None:
    """Everything ends with it. The next one serves."""
    daemon = make_daemon(POLICY)
    daemon.start()
    session = daemon.pid
    with at_stage(daemon, library, images_dir / "dest.qcow2", stage) as call:
        stop(daemon.pid)
        send(daemon.pid, signal.SIGKILL)
        call.end()
    daemon.wait()
    waiting.until(
        lambda: all(process.is_over for process in processes.of_session(session)), "all ended"
    )
    daemon.start()
    check_serves(daemon, library, images_dir)
