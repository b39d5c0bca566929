"""The clients on the real daemon: what they show, how they wait, and how they are interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Final

import pytest
from harness import images, processes, waiting
from harness.agent import conversion
from harness.callers import (
    ALICE,
    BOB,
    CONVERTCTL,
    GRPCURL,
    MALLORY,
    PYTHON,
    ROOT,
    Ran,
    owner_of,
)
from harness.daemon import QEMU_IMG, Daemon
from harness.fixtures import MakeDaemon
from policies import IMAGES, LIBRARY, Grant, Policy

from convertd.v1 import convert_pb2 as pb

POLICY: Final = Policy(operators=[0], grants=[Grant(read=[LIBRARY, IMAGES], write=[IMAGES])])

MIB: Final = 1024 * 1024


def slow_convertctl(daemon: Daemon, library: Path, dest: Path) -> subprocess.Popen[bytes]:
    """A convertctl in the middle of a conversion that takes a minute."""
    argv = [CONVERTCTL, "convert", str(library / "bulky.raw"), str(dest)]
    options = ("-f", "raw", "-O", "qcow2", "--rate-limit", "1MiB")
    process = ALICE.popen(
        [*argv, *options],
        env={"CONVERTD_SOCKET": str(daemon.socket)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    daemon.await_one(QEMU_IMG)
    return process


# --- grpcurl, and what every prober knows -------------------------------------------------------


def grpcurl(*arguments: str) -> Ran:
    """Run grpcurl as somebody whom the policy does not name."""
    return MALLORY.run([GRPCURL, "-plaintext", "-unix", *arguments])


def test_server_reflection_lists_the_service_to_every_user(daemon: Daemon) -> None:
    """By reflection: no .proto file is needed."""
    services = grpcurl(str(daemon.socket), "list").out.split()
    assert services == [
        "convertd.v1.ConvertService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    ]
    described = grpcurl(str(daemon.socket), "describe", "convertd.v1.ConvertRequest").out
    assert "rate_limit_bytes_per_second" in described


@pytest.mark.parametrize("service", ["", "convertd.v1.ConvertService"])
def test_health_check_is_answered_to_every_user(daemon: Daemon, service: str) -> None:
    """grpc.health.v1, for the daemon as a whole and for the service."""
    request = json.dumps({"service": service})
    ran = grpcurl("-d", request, str(daemon.socket), "grpc.health.v1.Health/Check")
    assert ran.json() == {"status": "SERVING"}


def test_refusal_details_are_readable_in_grpcurl(
    daemon: Daemon, library: Path, images_dir: Path
) -> None:
    """The details of a status are of types that it knows."""
    dest = images.small(images_dir / "there.raw")
    request = {
        "source": {"path": str(library / "small.raw"), "format": "raw"},
        "dest": {"path": str(dest), "format": "raw"},
    }
    ran = ALICE.grpcurl(daemon.socket, "Convert", request)
    assert ran.status != 0
    assert "DEST_EXISTS" in ran.err
    assert str(dest) in ran.err


# --- convertctl ---------------------------------------------------------------------------------


def test_convertctl_inspects_an_image_its_user_could_not_open(
    daemon: Daemon, library: Path
) -> None:
    """One that its user could not open."""
    ran = ALICE.convertctl(daemon.socket, "info", str(library / "small.qcow2"))
    assert ran.status == 0, ran
    assert "qcow2" in ran.out


def test_convertctl_lists_and_cancels_jobs_of_its_user(
    daemon: Daemon, library: Path, images_dir: Path
) -> None:
    """And tells the one that waits for it."""
    process = slow_convertctl(daemon, library, images_dir / "dest.qcow2")
    (job,) = daemon.agent(ALICE).jobs()
    listed = ALICE.convertctl(daemon.socket, "jobs")
    assert job.job_id in listed.out
    assert BOB.convertctl(daemon.socket, "cancel", job.job_id).status == 1
    assert ALICE.convertctl(daemon.socket, "cancel", job.job_id).status == 0
    _, err = process.communicate(timeout=waiting.DEADLINE_S)
    assert process.returncode == 1
    assert b"cancelled" in err
    assert os.listdir(images_dir) == []


def test_convertctl_says_when_an_operator_cancelled_the_job(
    daemon: Daemon, library: Path, images_dir: Path
) -> None:
    """Which is another thing than having done so oneself."""
    process = slow_convertctl(daemon, library, images_dir / "dest.qcow2")
    (job,) = daemon.agent(ROOT).jobs()
    assert ROOT.convertctl(daemon.socket, "cancel", job.job_id).status == 0
    _, err = process.communicate(timeout=waiting.DEADLINE_S)
    assert process.returncode == 1
    assert b"an operator cancelled the job" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_convertctl_cancels_the_job_and_leaves_nothing(
    daemon: Daemon, library: Path, images_dir: Path, number: signal.Signals
) -> None:
    """Ctrl-C cancels, and says that nothing was left."""
    process = slow_convertctl(daemon, library, images_dir / "dest.qcow2")
    process.send_signal(number)
    _, err = process.communicate(timeout=waiting.DEADLINE_S)
    assert process.returncode == 128 + (2 if number == signal.SIGINT else 15)
    assert b"nothing" in err
    daemon.await_idle()
    assert os.listdir(images_dir) == []


def test_convertctl_dry_run_shows_the_plan_and_converts_nothing(
    daemon: Daemon, library: Path, images_dir: Path
) -> None:
    """--dry-run."""
    paths = (str(library / "small.raw"), str(images_dir / "dest.qcow2"))
    ran = ALICE.convertctl(
        daemon.socket, "convert", *paths, "-f", "raw", "-O", "qcow2", "--dry-run"
    )
    assert ran.status == 0, ran
    assert os.listdir(images_dir) == []


def test_convertctl_json_output_has_the_refusal_and_its_reason(
    daemon: Daemon, library: Path, images_dir: Path
) -> None:
    """--json, and exit status 1."""
    paths = (str(library / "small.raw"), str(images_dir / "no" / "dest.qcow2"))
    ran = ALICE.convertctl(daemon.socket, "convert", *paths, "-f", "raw", "-O", "qcow2", "--json")
    assert ran.status == 1
    assert "DIRECTORY_NOT_FOUND" in ran.out + ran.err


# --- Python -------------------------------------------------------------------------------------

ASYNC_CLIENT: Final = """
import asyncio, sys
from convertd_client import AsyncClient
async def main(source, dest):
    async with AsyncClient() as client:
        result = await client.convert(source, dest, source_format="raw", dest_format="qcow2")
        print(result.published, (await client.access()).uid)
asyncio.run(main(*sys.argv[1:]))
"""


def test_asyncio_client_converts(daemon: Daemon, library: Path, images_dir: Path) -> None:
    """As the other one does."""
    dest = images_dir / "dest.qcow2"
    argv = [PYTHON, "-I", "-c", ASYNC_CLIENT, str(library / "small.raw"), str(dest)]
    ran = ALICE.run(argv, env={"CONVERTD_SOCKET": str(daemon.socket)})
    assert ran.out == f"True {ALICE.uid}\n", ran
    assert owner_of(dest) == (ALICE.uid, ALICE.gid, 0o600)


def test_python_refusal_has_its_class_reason_and_values(
    daemon: Daemon, library: Path, images_dir: Path
) -> None:
    """By which a program can act."""
    names = (str(library / "missing.raw"), str(images_dir / "dest.qcow2"))
    ran = ALICE.client(daemon.socket, "convert", *names, source_format="raw", dest_format="qcow2")
    told = ran.json()
    assert (told["error"], told["reason"]) == ("NotFound", "SOURCE_NOT_FOUND")
    assert told["metadata"] == {"path": names[0]}


PATIENT_CLIENT: Final = """
import sys
from convertd_client import Client
with Client(wait_for_ready=100) as client:
    client.convert(*sys.argv[1:], source_format="raw", dest_format="qcow2")
"""


def test_client_waits_for_a_starting_daemon(
    make_daemon: MakeDaemon, library: Path, images_dir: Path
) -> None:
    """As while one restarts: a call made in between is not lost."""
    daemon = make_daemon(POLICY)
    names = (str(library / "small.raw"), str(images_dir / "dest.qcow2"))
    process = ALICE.popen(
        [PYTHON, "-I", "-c", PATIENT_CLIENT, *names],
        env={"CONVERTD_SOCKET": str(daemon.socket)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    daemon.start()
    out, err = process.communicate(timeout=waiting.DEADLINE_S)
    assert process.returncode == 0, (out, err)
    assert images.identical(library / "small.raw", images_dir / "dest.qcow2")


# --- a client that does not read ----------------------------------------------------------------


def test_caller_that_does_not_read_events_does_not_block_its_job(
    daemon: Daemon, library: Path, images_dir: Path
) -> None:
    """Its conversion is done all the same; progress that nobody read is dropped, the result not."""
    alice, dest = daemon.agent(ALICE), images_dir / "dest.qcow2"
    call = alice.convert(conversion(library / "small.raw", dest, rate_limit_bytes_per_second=MIB))
    call.await_started()
    os.kill(alice.pid, signal.SIGSTOP)
    waiting.until(lambda: processes.state(alice.pid) == "T", "the caller is stopped")
    try:
        waiting.until(dest.exists, "the result")
        assert daemon.agent(ROOT).access().is_operator
    finally:
        os.kill(alice.pid, signal.SIGCONT)
    assert call.result().published
    phases = [pb.ConvertResponse.FromString(data).WhichOneof("event") for data in call.messages]
    assert phases.count("result") == 1
