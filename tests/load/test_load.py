"""Many callers, and bad ones: everyone gets a share, and afterwards all is as it was.

Sized for a small machine; CONVERTD_TEST_LOAD=full is 1,000 connections and 200 callers.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import select
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from harness import images, processes, waiting
from harness.agent import Agent, Call, conversion
from harness.callers import ALICE, BOB, PYTHON, Caller, come_and_go
from harness.daemon import FRONT, Daemon
from harness.fixtures import MakeDaemon
from policies import IMAGES, LIBRARY, Grant, Policy

from convertd.v1 import convert_pb2 as pb

POLICY: Final = Policy(
    limits={
        "jobs": 4,
        "jobs_per_user": 2,
        "queue": 1000,
        "queue_per_user": 100,
        "connections": 2000,
        "connections_per_user": 1500,
    },
    grants=[
        Grant(
            users=[
                1234,
                1235,
                3000,
                3001,
                3002,
                3003,
                3004,
                3005,
                3006,
                3007,
                3008,
                3009,
                3010,
                3011,
                3012,
                3013,
                3014,
                3015,
                3016,
                3017,
                3018,
                3019,
            ],
            read=[LIBRARY, IMAGES],
            write=[IMAGES],
        )
    ],
)

FULL: Final = os.environ.get("CONVERTD_TEST_LOAD") == "full"
CONNECTIONS: Final = 1000 if FULL else 250
USERS: Final = 20 if FULL else 5
CALLS_EACH: Final = 10 if FULL else 6
HONEST: Final = 100 if FULL else 5

PATIENCE_S: Final = 120.0
"""How long an honest caller waits for an answer, or we for a fact, on a machine that is busy."""

FRONT_MAY_KEEP_KIB: Final = 8 * 1024 + 32 * CONNECTIONS
BROKER_MAY_KEEP_KIB: Final = 2 * 1024
"""What an allocator keeps for the next time."""

UNDER_ATTACK_KIB: Final = 256 * 1024
"""Most of it by headers that never end: 166 MiB after four such attacks in a row, and no more."""

HEALTH: Final = "/grpc.health.v1.Health/Check"
HOSTILE: Final = Path(__file__).with_name("hostile.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What broker and front have: descriptors, and memory of their own in KiB."""

    descriptors: tuple[int, int]
    memory_kib: tuple[int, int]


def footprint(daemon: Daemon) -> Footprint:
    """The daemon's, now."""
    pids = (daemon.pid, daemon.await_one(FRONT))
    broker, front = (len(processes.descriptors(pid)) for pid in pids)
    of_broker, of_front = (processes.anonymous_kib(pid) for pid in pids)
    return Footprint(descriptors=(broker, front), memory_kib=(of_broker, of_front))


@contextlib.contextmanager
def unchanged(daemon: Daemon, *, front_may_keep_kib: int = FRONT_MAY_KEEP_KIB) -> Iterator[None]:
    """See that the daemon has as many descriptors as before, and hardly more memory."""
    before = footprint(daemon)
    yield
    daemon.await_idle()
    for number in range(2):
        most = before.descriptors[number] + processes.LAZY_DESCRIPTORS
        waiting.until(
            functools.partial(_has_at_most, daemon, number, most),
            f"no more than {most} descriptors",
            PATIENCE_S,
        )
    after = footprint(daemon)
    print(before, after)  # noqa: T201 - the figures of a long run
    assert after.memory_kib[0] - before.memory_kib[0] < BROKER_MAY_KEEP_KIB
    assert after.memory_kib[1] - before.memory_kib[1] < front_may_keep_kib


def _has_at_most(daemon: Daemon, number: int, descriptors: int) -> bool:
    return footprint(daemon).descriptors[number] <= descriptors


@pytest.fixture
def alice(daemon: Daemon) -> Agent:
    """An honest caller, connected."""
    agent = daemon.agent(ALICE)
    agent.access()
    return agent


@pytest.fixture
def bob(daemon: Daemon) -> Agent:
    """Another."""
    agent = daemon.agent(BOB)
    agent.access()
    return agent


def seconds_of(act: Callable[[], object]) -> float:
    """How long something takes."""
    began = time.monotonic()
    act()
    return time.monotonic() - began


def check_health(agent: Agent) -> None:
    """Ask for the daemon's health as a prober does."""
    call = agent.call(HEALTH, b"")
    assert call.end(PATIENCE_S).status == "OK"
    assert call.messages == [b"\x08\x01"]  # SERVING


# --- connections --------------------------------------------------------------------------------


@pytest.mark.parametrize("wave", [1, 2])
def test_daemon_serves_and_releases_many_connections(
    daemon: Daemon, alice: Agent, library: Path, images_dir: Path, wave: int
) -> None:
    """Each is greeted; meanwhile others are served; and afterwards nothing of them is left."""
    assert wave
    with unchanged(daemon), contextlib.ExitStack() as stack:
        socks = [stack.enter_context(greeting(daemon.socket)) for _ in range(CONNECTIONS)]
        for sock in socks:
            assert select.select([sock], [], [], waiting.DEADLINE_S)[0]
            assert sock.recv(9)[3] == 4  # SETTINGS
        check_health(alice)
        alice.convert(conversion(library / "small.raw", images_dir / "dest.qcow2")).result()


def greeting(path: Path) -> socket.socket:
    """A connection that has said what HTTP/2 begins with, and no more."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
    return sock


# --- a queue ------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_each_queued_user_is_served_once_per_round_and_other_calls_at_once(
    daemon: Daemon, alice: Agent, bob: Agent, library: Path, images_dir: Path
) -> None:
    """All wait first, so that the order in which they start is the queue's alone."""
    users = [Caller(uid=3000 + number, gid=3000 + number) for number in range(USERS)]
    agents = [daemon.agent(user) for user in users]
    for agent in agents:
        agent.access()
    with unchanged(daemon):
        blocking = occupied((alice, bob), library / "bulky.raw", images_dir)
        calls = [
            agent.convert(
                conversion(library / "small.qcow2", images_dir / name, source_format="qcow2")
            )
            for agent in agents
            for name in (f"{agent.caller.uid}-{number}.qcow2" for number in range(CALLS_EACH))
        ]
        for call in calls:
            call.await_queued()
        waits = alice.convert(slow(library / "bulky.raw", images_dir / "cancelled.qcow2"))
        job_id = waits.await_queued().job_id
        begun = len(starts(daemon))
        for call in blocking:
            call.cancel()
        slowest_s = 0.0
        for act in (
            alice.jobs,
            lambda: check_health(bob),
            lambda: alice.call("Inspect", inspect(library / "small.qcow2")).end(),
            lambda: alice.cancel_job(job_id),
            alice.access,
        ):
            slowest_s = max(slowest_s, seconds_of(act))
        assert waits.end().status == "CANCELLED"
        for call in calls:
            call.result(deadline_s=300)
        print(f"{slowest_s=:.3f}")  # noqa: T201 - the figures of a long run
        check_fair(starts(daemon)[begun:], {user.uid for user in users})
    for user in users:
        daemon.kill_agent(user)


def slow(source: Path, dest: Path) -> pb.ConvertRequest:
    """A conversion that takes a minute."""
    return conversion(source, dest, rate_limit_bytes_per_second=images.MIB)


def inspect(path: Path) -> pb.InspectRequest:
    """A look at an image."""
    return pb.InspectRequest(source=pb.Source(path=str(path)))


def occupied(agents: tuple[Agent, ...], source: Path, directory: Path) -> list[Call]:
    """Slow conversions in all four places."""
    calls = [
        agent.convert(slow(source, directory / f"slow-{agent.caller.uid}-{number}"))
        for agent in agents
        for number in range(2)
    ]
    for call in calls:
        call.await_started()
    return calls


def starts(daemon: Daemon) -> list[int]:
    """The uids of all jobs, in the order in which they were started."""
    log = daemon.log
    uids = {job: int(uid) for job, uid in re.findall(r"granted job=(\w+) uid=(\d+)", log)}
    return [uids[job] for job in re.findall(r"started job=(\w+) pid=", log)]


def check_fair(order: list[int], users: set[int]) -> None:
    """At no time has a user had two turns more than another."""
    turns: Counter[int] = Counter(dict.fromkeys(users, 0))
    for uid in order:
        if uid in users:
            turns[uid] += 1
            assert max(turns.values()) - min(turns.values()) <= 1
    assert set(turns.values()) == {CALLS_EACH}


# --- bad clients --------------------------------------------------------------------------------

WAYS: Final = (
    *("half_open", "come_and_go", "slow", "no_message", "rapid_reset", "ping_flood"),
    *("settings_flood", "endless_headers", "large_messages", "stopped_reader", "busy", "garbage"),
)


@pytest.mark.timeout(600)
def test_normal_caller_is_served_while_abusive_clients_run(
    make_daemon: MakeDaemon, library: Path, images_dir: Path
) -> None:
    """Each bad client is a user of its own, as many times as it may connect, all at once."""
    daemon = make_daemon(POLICY.with_limits(connections_per_user=100))
    daemon.start()
    daemon.agent(ALICE).access()
    with unchanged(daemon, front_may_keep_kib=UNDER_ATTACK_KIB):
        took = served_under_attack(daemon, library / "small.raw", images_dir)
    print(f"{took=}")  # noqa: T201 - the figures of a long run
    assert "Traceback" not in daemon.log


def served_under_attack(daemon: Daemon, source: Path, directory: Path) -> list[float]:
    """Convert for an honest caller, while all bad clients are at work. Seconds for each."""
    alice, took = daemon.agent(ALICE), []
    with attacked(daemon, WAYS):
        capped = "too many connections uid=4000"
        waiting.until(lambda: capped in daemon.log, "the cap is reached", PATIENCE_S)
        for number in range(HONEST):
            began = time.monotonic()
            alice.convert(conversion(source, directory / f"{number}.qcow2")).result(PATIENCE_S)
            check_health(alice)
            took.append(time.monotonic() - began)
    return took


@contextlib.contextmanager
def attacked(daemon: Daemon, ways: Sequence[str]) -> Iterator[None]:
    """Let users do something to the daemon, each of them one thing, as often as they can.

    They are nice: whom the kernel lets run is not the daemon's to say, and they never wait.
    """
    script = HOSTILE.read_text(encoding="utf-8")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with contextlib.ExitStack() as stack:
        running = []
        for uid, how in enumerate(ways, 4000):
            argv = ["nice", "-n", "10", PYTHON, "-I", "-c", script, str(daemon.socket), how]
            process = stack.enter_context(Caller(uid=uid, gid=uid).popen(argv, **pipes))
            stack.callback(process.kill)
            running.append(process)
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
        yield
        for process in running:
            output, _ = process.communicate(timeout=PATIENCE_S)
            assert int(output) > 0


CALLS: Final = 60


@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["stopped_reader", "busy"])
def test_client_that_calls_continuously_does_not_block_other_calls(
    make_daemon: MakeDaemon, how: str
) -> None:
    """GRPC takes calls in the order in which they come, and cancels those of which it has many."""
    daemon = make_daemon(POLICY.with_limits(connections_per_user=100))
    daemon.start()
    alice = daemon.agent(ALICE)
    alice.access()
    with unchanged(daemon, front_may_keep_kib=UNDER_ATTACK_KIB), attacked(daemon, [how] * 6):
        took = [seconds_of(alice.access) for _ in range(CALLS)]
    print(f"{max(took)=:.3f}")  # noqa: T201 - the figures of a long run


CROWD: Final = 4
PINGS: Final = 3
"""One alone may find room in the backlog by luck."""


@pytest.mark.timeout(600)
def test_watchdog_is_notified_under_a_flood_of_connections(
    make_daemon: MakeDaemon,
) -> None:
    """Whoever connects and is gone at once, as fast as it can, keeps its backlog full."""
    daemon = make_daemon(POLICY)
    daemon.start(wrapper=("env", "WATCHDOG_USEC=9000000"))
    with attacked(daemon, ["come_and_go"] * CROWD):
        waiting.until(lambda: not come_and_go(daemon.socket), "the backlog is full", PATIENCE_S)
        for _ in range(PINGS):
            daemon.await_notice("WATCHDOG=1", PATIENCE_S)
