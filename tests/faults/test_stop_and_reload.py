"""SIGTERM lets what runs finish; SIGHUP takes a new policy, or keeps the old one."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Final

import pytest
from harness import callers, images, processes, waiting
from harness.agent import Call, conversion
from harness.callers import ALICE, BOB
from harness.daemon import FRONT, JOB, QEMU_IMG, Daemon, DidNotStart
from harness.fixtures import FillPolicy, MakeDaemon
from harness.tracing import Tracer
from policies import IMAGES, LIBRARY, Grant, Policy

from convertd.v1 import convert_pb2 as pb

POLICY: Final = Policy(
    limits={"jobs": 1, "jobs_per_user": 1, "stop_grace": "30 s"},
    grants=[Grant(read=[LIBRARY], write=[IMAGES])],
)

MIB: Final = 1024 * 1024


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> Daemon:
    """A daemon with one place."""
    one = make_daemon(POLICY)
    one.start()
    return one


def begin(daemon: Daemon, source: Path, dest: Path) -> Call:
    """Begin a conversion at 1 MiB/s, and wait until qemu-img works."""
    request = conversion(source, dest, rate_limit_bytes_per_second=MIB)
    call = daemon.agent(ALICE).convert(request)
    call.await_event(lambda event: event.progress.phase == pb.PHASE_CONVERTING)
    daemon.await_one(QEMU_IMG)
    return call


def check_stopped(daemon: Daemon) -> None:
    """See that it ends with 0, and leaves nothing."""
    assert daemon.wait() == 0
    daemon.check_nothing_is_left()


# --- SIGTERM ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_finishes_running_jobs_and_refuses_queued_ones(
    daemon: Daemon, library: Path, images_dir: Path, number: signal.Signals
) -> None:
    """A caller whose request had not begun is told to come again, and with what reason."""
    running = begin(daemon, library / "slow.raw", images_dir / "dest.qcow2")
    with daemon.stopped(QEMU_IMG):
        request = conversion(library / "small.raw", images_dir / "b.qcow2")
        queued = daemon.agent(ALICE).convert(request)
        queued.await_queued()
        daemon.signal(number)
        refusal = queued.refusal()
    assert (refusal.status, refusal.reason) == ("UNAVAILABLE", "STOPPING")
    assert running.result().published
    assert images.identical(library / "slow.raw", images_dir / "dest.qcow2")
    assert os.listdir(images_dir) == ["dest.qcow2"]
    check_stopped(daemon)


def test_stopping_daemon_accepts_no_connection_and_refuses_new_requests(
    daemon: Daemon, library: Path, images_dir: Path
) -> None:
    """While what runs is finished."""
    running = begin(daemon, library / "slow.raw", images_dir / "dest.qcow2")
    with daemon.stopped(QEMU_IMG):
        daemon.signal(signal.SIGTERM)
        daemon.await_notice("STOPPING=1")
        waiting.until(lambda: not daemon.socket.exists(), "the socket is gone")
        for call in (
            daemon.agent(ALICE).convert(conversion(library / "small.raw", images_dir / "b.qcow2")),
            daemon.agent(ALICE).call(
                "Inspect", pb.InspectRequest(source=pb.Source(path=str(library / "small.raw")))
            ),
        ):
            refusal = call.refusal()
            assert (refusal.status, refusal.reason) == ("UNAVAILABLE", "STOPPING")
    assert running.result().published
    check_stopped(daemon)


def test_daemon_started_while_another_stops_keeps_its_socket(
    daemon: Daemon, make_daemon: MakeDaemon, library: Path, images_dir: Path
) -> None:
    """By hand: a manager waits for the first one's end."""
    running = begin(daemon, library / "slow.raw", images_dir / "dest.qcow2")
    daemon.signal(signal.SIGTERM)
    waiting.until(lambda: not daemon.socket.exists(), "the socket is gone")
    second = make_daemon(POLICY)
    second.socket, second.private = daemon.socket, daemon.private
    second.start()
    assert running.result().published
    assert daemon.wait() == 0
    request = conversion(library / "small.raw", images_dir / "other.qcow2")
    assert second.agent(ALICE).convert(request).result().published


def test_second_sigterm_ends_running_jobs(daemon: Daemon, library: Path, images_dir: Path) -> None:
    """Somebody is in a hurry."""
    running = begin(daemon, library / "bulky.raw", images_dir / "dest.qcow2")
    daemon.signal(signal.SIGTERM)
    daemon.await_notice("STOPPING=1")
    assert len(daemon.processes(JOB)) == 1
    daemon.signal(signal.SIGTERM)
    refusal = running.refusal()
    assert (refusal.status, refusal.reason) == ("UNAVAILABLE", "STOPPING")
    check_stopped(daemon)
    assert os.listdir(images_dir) == []


def test_job_still_running_after_the_grace_period_is_ended(
    make_daemon: MakeDaemon, library: Path, images_dir: Path
) -> None:
    """The policy says how long that is."""
    daemon = make_daemon(POLICY.with_limits(stop_grace="1 s"))
    daemon.start()
    running = begin(daemon, library / "bulky.raw", images_dir / "dest.qcow2")
    began = time.monotonic()
    daemon.signal(signal.SIGTERM)
    assert running.refusal().reason == "STOPPING"
    assert time.monotonic() - began > 0.9
    check_stopped(daemon)
    assert os.listdir(images_dir) == []


def test_idle_daemon_stops_at_once(daemon: Daemon) -> None:
    """With clients connected: the grace is for what runs, and longer than we wait here."""
    daemon.agent(ALICE).access()
    daemon.stop()


def test_daemon_stops_while_its_front_is_dead(daemon: Daemon) -> None:
    """It waits for nobody who can't come."""
    front = daemon.await_one(FRONT)
    os.kill(front, signal.SIGKILL)
    daemon.signal(signal.SIGTERM)
    check_stopped(daemon)


def test_front_that_ignores_the_stop_request_is_killed(daemon: Daemon) -> None:
    """It is asked first, by closing its channel."""
    os.kill(daemon.await_one(FRONT), signal.SIGSTOP)
    daemon.signal(signal.SIGTERM)
    check_stopped(daemon)


def test_daemon_exits_when_its_front_dies_repeatedly(daemon: Daemon) -> None:
    """The daemon ends, for its manager to decide, with status 1 and one line that says why."""
    seen: set[int] = set()
    while daemon.is_running:
        for process in daemon.processes():
            if process.pid != daemon.pid and process.pid not in seen:
                seen.add(process.pid)
                # One that was forked for a moment only may be gone already.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
    assert daemon.wait() == 1
    last = daemon.log.splitlines()[-1]
    assert last.startswith("convertd: the front ended repeatedly")
    assert len(seen) > 1
    daemon.check_nothing_is_left()


def test_daemon_exits_when_its_front_can_not_start(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    """The first ends while the self-test runs, when nobody listens for that yet."""
    crash = (
        "import os, sys\nif sys.orig_argv[2:4] == ['-m', 'convertd_daemon.front']:\n os._exit(1)"
    )
    (tmp_path / "sitecustomize.py").write_text(crash, encoding="utf-8")
    callers.make_reachable(tmp_path)
    daemon = make_daemon(POLICY)
    with pytest.raises(DidNotStart) as ended:
        daemon.start(wrapper=("env", f"PYTHONPATH={tmp_path}"))
    assert ended.value.status == 1
    last = ended.value.output.splitlines()[-1]
    assert last.startswith("convertd: the front ended repeatedly")


# --- SIGHUP -------------------------------------------------------------------------------------


def test_reloaded_policy_applies_to_the_next_request(
    daemon: Daemon, fill_in: FillPolicy, library: Path, images_dir: Path
) -> None:
    """Also over a connection that was there before."""
    bob = daemon.agent(BOB)
    request = conversion(library / "small.raw", images_dir / "dest.qcow2")
    assert bob.convert(request).refusal().status == "PERMISSION_DENIED"
    daemon.reload(fill_in(POLICY.for_users(ALICE.uid, BOB.uid)))
    assert bob.convert(request).result().published
    daemon.reload(fill_in(POLICY))
    request.dest.path += "2"
    assert bob.convert(request).refusal().status == "PERMISSION_DENIED"


def test_running_job_keeps_the_policy_it_started_with(
    daemon: Daemon, fill_in: FillPolicy, library: Path, images_dir: Path
) -> None:
    """Even one that would not allow it any more."""
    running = begin(daemon, library / "slow.raw", images_dir / "dest.qcow2")
    daemon.reload(fill_in(POLICY.for_users(BOB.uid)))
    request = conversion(library / "small.raw", images_dir / "other.qcow2")
    assert daemon.agent(ALICE).convert(request).refusal().status == "PERMISSION_DENIED"
    assert running.result().published


def test_raised_job_limit_after_a_reload_starts_queued_jobs(
    daemon: Daemon, fill_in: FillPolicy, library: Path, images_dir: Path
) -> None:
    """At once, and not only when a place becomes free."""
    running = begin(daemon, library / "bulky.raw", images_dir / "slow.qcow2")
    queued = daemon.agent(ALICE).convert(conversion(library / "small.raw", images_dir / "b.qcow2"))
    queued.await_queued()
    daemon.reload(fill_in(POLICY.with_limits(jobs=2, jobs_per_user=2)))
    assert queued.result().published
    running.cancel()
    assert running.end().status == "CANCELLED"


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        pytest.param("[limits]\njobs = 0", "limits.jobs: must be from 1 to 256", id="limit"),
        pytest.param("[limits", "is not TOML", id="no TOML"),
        pytest.param("jobs = 4", "jobs: is not a key of the policy", id="unknown key"),
    ],
)
def test_reload_of_an_invalid_policy_keeps_the_old_one_and_logs_why(
    daemon: Daemon, library: Path, images_dir: Path, policy: str, reason: str
) -> None:
    """With the file and the key, in the log."""
    daemon.reload(policy)
    daemon.await_logged("policy not reloaded, the old one stays in force")
    assert f"{daemon.policy_path}: {reason}" in daemon.log
    request = conversion(library / "small.raw", images_dir / "dest.qcow2")
    assert daemon.agent(ALICE).convert(request).result().published


def test_reload_of_a_policy_that_others_can_write_keeps_the_old_one(
    daemon: Daemon, library: Path, images_dir: Path
) -> None:
    """Nor one that is not there."""
    daemon.policy_path.chmod(0o666)
    daemon.signal(signal.SIGHUP)
    daemon.await_notice("READY=1")
    assert "can be changed by everybody" in daemon.log
    daemon.policy_path.unlink()
    daemon.signal(signal.SIGHUP)
    daemon.await_notice("READY=1")
    assert "No such file or directory" in daemon.log
    request = conversion(library / "small.raw", images_dir / "dest.qcow2")
    assert daemon.agent(ALICE).convert(request).result().published


@pytest.mark.parametrize(
    ("inject", "reason"),
    [
        ("clone:error=EAGAIN", "can't be checked: Resource temporarily unavailable"),
        ("pipe2:error=EMFILE", "can't be checked: Too many open files"),
    ],
)
def test_reload_keeps_the_old_policy_if_the_new_one_can_not_be_checked(
    daemon: Daemon, library: Path, images_dir: Path, inject: str, reason: str
) -> None:
    """No process, or no descriptor, is to be had: what runs goes on, under the policy in force."""
    running = begin(daemon, library / "slow.raw", images_dir / "slow.qcow2")
    with Tracer([daemon.pid], inject, follow=False):
        daemon.reload(daemon.policy_path.read_text(encoding="utf-8"))
    stays = "policy not reloaded, the old one stays in force"
    assert f"{stays}: {daemon.policy_path}: {reason}" in daemon.log
    assert running.result().published
    request = conversion(library / "small.raw", images_dir / "dest.qcow2")
    assert daemon.agent(ALICE).convert(request).result().published


def test_repeated_reloads_leave_no_process_behind(daemon: Daemon, fill_in: FillPolicy) -> None:
    """Each looks names up in a child."""
    named = POLICY.for_users(ALICE.uid, "root", "no-such-user")
    for _ in range(10):
        daemon.reload(fill_in(named))
    daemon.await_idle()
    waiting.until(lambda: len(daemon.processes()) == 3, "broker, front and preforked job")
    assert "there is no user no-such-user" in daemon.log


# --- a manager that does not read ---------------------------------------------------------------


def test_unread_notify_socket_does_not_block_the_daemon(
    daemon: Daemon, library: Path, images_dir: Path
) -> None:
    """Its socket takes ten messages; each conversion is worth two."""
    for number in range(20):
        dest = images_dir / f"{number}.qcow2"
        daemon.agent(ALICE).convert(conversion(library / "small.raw", dest)).result()
    assert len(os.listdir(images_dir)) == 20


def test_broker_resumed_after_sigstop_serves_waiting_callers(
    daemon: Daemon, library: Path, images_dir: Path
) -> None:
    """It serves whoever came meanwhile."""
    agent = daemon.agent(ALICE)
    daemon.signal(signal.SIGSTOP)
    waiting.until(lambda: processes.state(daemon.pid) == "T", "the broker is stopped")
    call = agent.convert(conversion(library / "small.raw", images_dir / "a.qcow2"))
    daemon.signal(signal.SIGCONT)
    assert call.result().published
