"""A caller in as many groups as the kernel allows: what it costs the broker, and what it may."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

from harness import images, processes, waiting
from harness.agent import conversion
from harness.callers import PYTHON, Caller
from harness.daemon import PREFORKED_JOB, Daemon
from policies import IMAGES, LIBRARY, Grant, Policy

from convertd.v1 import convert_pb2 as pb

POLICY: Final = Policy(
    limits={"jobs": 1, "jobs_per_user": 1, "queue": 64, "queue_per_user": 64},
    grants=[Grant(users=None, groups=[165535], read=[LIBRARY, IMAGES], write=[IMAGES])],
)

MOST_GROUPS: Final = 65_536
"""NGROUPS_MAX. Source: getgroups(2)."""

CROWDED: Final = Caller(uid=1700, gid=1700, groups=tuple(range(100_000, 100_000 + MOST_GROUPS)))
"""Who is granted something by the last of its groups."""

CONNECTIONS: Final = 120
MOST_KIB: Final = 24 * 1024
"""Of which most is for one set of groups at a time. Kept for each connection they took 527 MB."""

ASKING_S: Final = 0.003
"""Processor time in which all groups can't be taken in. A call takes a tenth of it."""

_CROWD: Final = """
import socket, sys
kept = [socket.socket(socket.AF_UNIX) for _ in range(int(sys.argv[2]))]
for sock in kept:
    sock.connect(sys.argv[1])
print(flush=True)
sys.stdin.read()
"""


def ticks_of(pid: int) -> int:
    """Processor time that a process has taken. Source: proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_groups_of_a_caller_use_no_memory_until_a_decision_needs_them(daemon: Daemon) -> None:
    """The kernel keeps them with the socket; the broker asks when it must know."""
    before = processes.anonymous_kib(daemon.pid)
    sockets = len(processes.descriptors(daemon.pid))
    argv = [PYTHON, "-I", "-c", _CROWD, str(daemon.socket), str(CONNECTIONS)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with CROWDED.popen(argv, **pipes) as process:
        waiting.until(
            lambda: len(processes.descriptors(daemon.pid)) >= sockets + CONNECTIONS,
            "everybody is let in",
        )
        assert processes.anonymous_kib(daemon.pid) < before + MOST_KIB
        process.kill()


def test_groups_of_a_caller_are_read_once_per_connection(daemon: Daemon) -> None:
    """Each time takes milliseconds, in which nobody else is heard."""
    agent = daemon.agent(CROWDED)
    assert agent.jobs() == []
    before = ticks_of(daemon.pid)
    for _ in range(200):
        agent.jobs()
        refused = agent.call("GetAccess", pb.GetAccessRequest()).refusal()
        assert refused.reason == "UNSUPPORTED"
    spent_s = (ticks_of(daemon.pid) - before) / os.sysconf("SC_CLK_TCK")
    assert spent_s < 400 * ASKING_S


def test_groups_of_a_queued_request_count_in_the_policy_and_use_no_memory(
    daemon: Daemon, library: Path, images_dir: Path
) -> None:
    """Each request is held against all of them; each job is started with all of them."""
    agent = daemon.agent(CROWDED)
    before = processes.anonymous_kib(daemon.pid)
    slow = agent.convert(
        conversion(
            library / "bulky.raw", images_dir / "slow", rate_limit_bytes_per_second=images.MIB
        )
    )
    slow.await_started()
    queued = [
        agent.convert(conversion(library / "small.raw", images_dir / f"dest-{number}"))
        for number in range(25)
    ]
    waiting.until(lambda: daemon.log.count("granted job=") == 26, "all are queued")
    assert processes.anonymous_kib(daemon.pid) < before + MOST_KIB
    for call in queued[1:]:
        call.cancel()
    slow.cancel()
    queued[0].result()
    assert images.identical(library / "small.raw", images_dir / "dest-0")
    for call in (slow, *queued[1:]):
        call.end()


def test_job_of_a_caller_in_many_groups_does_not_use_the_preforked_job(
    daemon: Daemon, library: Path
) -> None:
    """Their groups do not fit into a message to the one forked ahead, so it is not tried."""
    preforked = daemon.await_one(PREFORKED_JOB)
    asked = pb.InspectRequest(source=pb.Source(path=str(library / "small.raw"), format="raw"))
    assert daemon.agent(CROWDED).call("Inspect", asked).end().status == "OK"
    assert daemon.await_one(PREFORKED_JOB) == preforked
