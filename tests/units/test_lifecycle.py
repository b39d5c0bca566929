"""The service through its life: reload, watchdog, restart, stop, kill, idleness."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import booted
import pytest
from policies import Policy

ALICE = 1234
IMAGES = "/srv/images"
SERVICE = "convertd.service"

SLOW = "--rate-limit=1MiB"
"""A conversion that takes as long as its source has mebibytes, in seconds."""


@pytest.fixture
def service(machine: booted.Machine) -> booted.Machine:
    """The machine with a root of images that Alice may use."""
    machine.grant(IMAGES, ALICE)
    return machine


def main_pid(machine: booted.Machine) -> int:
    """The broker's pid, 0 if there is none."""
    return int(machine.show(SERVICE, "MainPID")["MainPID"])


def status(machine: booted.Machine) -> str:
    """The line that `systemctl status` shows."""
    return machine.show(SERVICE, "StatusText")["StatusText"]


def processes(machine: booted.Machine) -> list[str]:
    """The names of the processes in the service's cgroup."""
    group = machine.show(SERVICE, "ControlGroup")["ControlGroup"]
    if not group:
        return []
    listed = machine.run(
        *("sh", "-c"),
        f"for pid in $(cat /sys/fs/cgroup/*{group}/cgroup.procs /sys/fs/cgroup{group}/cgroup.procs"
        " 2>/dev/null | sort -u); do cat /proc/$pid/comm; done",
        check=False,
    )
    return listed.stdout.split()


def begin(machine: booted.Machine, name: str) -> subprocess.Popen[str]:
    """Start a conversion that takes minutes, as Alice, and wait until qemu-img is at work."""
    machine.run("rm", "-f", f"{IMAGES}/{name}")
    machine.run("qemu-img", "create", "-q", "-f", "raw", f"{IMAGES}/big.raw", "100M")
    machine.run("dd", "if=/dev/urandom", f"of={IMAGES}/big.raw", "bs=1M", "count=90", "status=none")
    running = machine.start(
        *("convertctl", "convert", f"{IMAGES}/big.raw", f"{IMAGES}/{name}"),
        *("-f", "raw", "-O", "raw", SLOW, "-q"),
        uid=ALICE,
    )
    booted.wait_for(lambda: "qemu-img" in processes(machine), "qemu-img")
    return running


def left(machine: booted.Machine) -> set[str]:
    """What lies in the root of images."""
    return set(machine.output_of("ls", "-A", IMAGES).split())


def test_systemctl_reload_applies_a_valid_policy(service: booted.Machine) -> None:
    """Without a restart: the broker stays."""
    before = main_pid(service)
    service.write(booted.POLICY_PATH, str(Policy(limits={"jobs": 3})))
    service.run("systemctl", "reload", SERVICE)
    booted.wait_for(
        lambda: "jobs at once  3" in service.access(ALICE),
        "the new policy",
    )
    assert main_pid(service) == before
    assert service.show(SERVICE, "ActiveState")["ActiveState"] == "active"


def test_systemctl_reload_keeps_the_old_policy_if_the_new_one_is_invalid(
    service: booted.Machine,
) -> None:
    """The old one stays in force, and status and journal say which key is wrong."""
    service.write(booted.POLICY_PATH, str(Policy(limits={"jobs": 0})))
    service.run("systemctl", "reload", SERVICE)
    booted.wait_for(lambda: "NOT reloaded" in status(service), "the status")
    assert "limits.jobs" in status(service)
    assert "you may" in service.access(ALICE)
    assert IMAGES in service.access(ALICE)
    assert any("limits.jobs" in entry["MESSAGE"] for entry in service.journal("-p", "err", "-n10"))


def test_service_status_shows_running_and_queued_jobs(service: booted.Machine) -> None:
    """How many run and wait, and whom the daemon refused last."""
    service.run("convertctl", "info", "/etc/passwd", uid=ALICE, check=False)
    booted.wait_for(lambda: "last refusal PERMISSION_DENIED for uid 1234" in status(service), "it")
    with begin(service, "status.raw"):
        booted.wait_for(lambda: status(service).startswith("1 running, 0 queued"), "it runs")
        service.run("pkill", f"--uid={ALICE}", "convertctl")
    booted.wait_for(lambda: status(service).startswith("0 running, 0 queued"), "it ended")


@pytest.fixture
def watched(service: booted.Machine) -> Iterator[booted.Machine]:
    """The service, with a watchdog that bites earlier."""
    directory = "/run/systemd/system/convertd.service.d"
    service.write(f"{directory}/watchdog.conf", "[Service]\nWatchdogSec=8s\n")
    service.run("systemctl", "daemon-reload")
    service.run("systemctl", "restart", SERVICE)
    yield service
    service.run("rm", f"{directory}/watchdog.conf")
    service.run("systemctl", "daemon-reload")


@pytest.mark.parametrize("frozen", ["front", "broker"])
def test_watchdog_restarts_a_daemon_with_a_frozen_process(
    watched: booted.Machine, frozen: str
) -> None:
    """A ping takes a health check through the public socket, so either process's silence counts."""
    broker = main_pid(watched)
    front = watched.output_of("pgrep", "--parent", str(broker), "--full", "convertd_daemon.front")
    # It pings: it outlives the limit. A fact that takes time to come true.
    began = watched.show(SERVICE, "WatchdogTimestampMonotonic")
    booted.wait_for(lambda: watched.show(SERVICE, "WatchdogTimestampMonotonic") != began, "a ping")
    watched.run("kill", "-STOP", front if frozen == "front" else str(broker))
    booted.wait_for(lambda: main_pid(watched) not in {0, broker}, "another broker")
    assert "you are alice" in watched.access(ALICE)
    assert "watchdog" in json.dumps(watched.journal("-u", SERVICE, "-n", "40"))


CALLERS = """
import os
from convertd_client import Client

def call():
    with Client(wait_for_ready=250) as client:
        client.access(timeout=250)

callers = []
for _ in range(50):
    if not (pid := os.fork()):
        try:
            call()
            os._exit(0)
        finally:
            os._exit(1)
    callers.append(pid)
print([os.waitpid(pid, 0)[1] for pid in callers].count(0))
"""
"""Processes, for connections of one process to one place are one connection to gRPC."""


def test_service_restart_loses_no_waiting_caller(service: booted.Machine) -> None:
    """They wait in the socket's queue, which is systemd's, until there is a daemon again."""
    service.run("systemctl", "stop", SERVICE)
    # A start that is held back: all of them are in the queue before there is a daemon.
    service.write(
        "/run/systemd/system/convertd.service.d/late.conf",
        "[Service]\nExecStartPre=/bin/sh -c 'until test -e /run/go; do sleep 0.1; done'\n",
    )
    service.run("systemctl", "daemon-reload")
    python = "/usr/local/lib/convertd/bin/python3"
    with service.start(python, "-c", CALLERS, uid=ALICE) as callers:
        try:
            booted.wait_for(lambda: waiting(service) >= 50, "fifty in the queue")
        finally:
            service.run("touch", "/run/go")
        assert callers.communicate(timeout=booted.WAIT_S)[0].strip() == "50"
    service.run("rm", "/run/go", "/run/systemd/system/convertd.service.d/late.conf")
    service.run("systemctl", "daemon-reload")


def waiting(machine: booted.Machine) -> int:
    """How many connections nobody has accepted yet. Source: ss(8), Recv-Q of a listening socket.

    Machines that run meanwhile have sockets of that name in the same list, at which nobody waits.
    """
    lines = machine.output_of("ss", "-xlH", "src", "/run/convertd/convertd.sock").splitlines()
    return max(int(line.split()[2]) for line in lines)


def test_service_stop_cancels_running_jobs_after_the_grace_period(service: booted.Machine) -> None:
    """The grace over, the conversion is cancelled: no file, no process, and a record of it."""
    service.grant(IMAGES, ALICE, Policy(limits={"stop_grace": "1 s"}))
    with begin(service, "stopped.raw") as running:
        before = left(service)
        service.run("systemctl", "stop", SERVICE)
        assert running.wait(booted.WAIT_S) == 1
    assert service.show(SERVICE, "Result")["Result"] == "success"
    assert processes(service) == []
    assert left(service) == before
    (record,) = service.journal(f"CONVERTD_DEST={IMAGES}/stopped.raw", "CONVERTD_REASON=STOPPING")
    assert record["CONVERTD_OUTCOME"] == "failed"


def test_service_kill_leaves_nothing_and_the_next_call_is_served(
    service: booted.Machine,
) -> None:
    """`systemctl kill -s KILL`: the kernel takes the unnamed result away."""
    with begin(service, "killed.raw") as running:
        before = left(service)
        service.run("systemctl", "kill", "--signal=KILL", SERVICE)
        assert running.wait(booted.WAIT_S) == 1
    assert "you are alice" in service.access(ALICE)
    assert left(service) == before
    assert "qemu-img" not in processes(service)


def test_idle_exit_stops_the_service_and_the_next_call_starts_it(
    service: booted.Machine,
) -> None:
    """The socket stays."""
    service.grant(IMAGES, ALICE, Policy(service={"idle_exit": "1 s"}))
    booted.wait_for(
        lambda: service.show(SERVICE, "ActiveState")["ActiveState"] == "inactive", "its end"
    )
    assert service.show(SERVICE, "Result")["Result"] == "success"
    assert "you are alice" in service.access(ALICE)


def test_unit_sandbox_limits_a_policy_without_its_drop_in(service: booted.Machine) -> None:
    """A policy that was edited alone reaches no further: the kernel says no."""
    service.run("mkdir", "-p", "/srv/other")
    policy = service.output_of("cat", booted.POLICY_PATH).replace(IMAGES, "/srv/other")
    service.write(booted.POLICY_PATH, policy)
    service.run("qemu-img", "create", "-q", "-f", "raw", "/srv/other/a.raw", "1M")
    service.run("systemctl", "reload", SERVICE)
    booted.wait_for(lambda: "/srv/other" in service.access(ALICE), "the new policy")
    convert = ("convertctl", "convert", "/srv/other/a.raw", "/srv/other/b.raw", "-O", "raw")
    refused = service.run(*convert, uid=ALICE, check=False)
    assert refused.returncode == 1
    assert "READ_ONLY" in refused.stderr
    told = service.run("convertd", "check", check=False)
    assert told.returncode == 1
    assert "/srv/other can't be written: it is in no ReadWritePaths=" in told.stderr


def test_shipped_unit_passes_systemd_analyze_verify(service: booted.Machine) -> None:
    """`systemd-analyze verify` says nothing."""
    files = [f"/usr/local/lib/systemd/system/convertd.{kind}" for kind in ("service", "socket")]
    verified = service.run("systemd-analyze", "verify", "--man=no", *files)
    assert verified.stdout + verified.stderr == ""
