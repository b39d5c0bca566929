"""A qemu-img that does what it likes: the daemon takes it neither at its word nor for gone.

In its place stands a program of ours (misbehaving.c), at the path that the policy names, put there
after the daemon has tested the real one. What it does to itself is up to it; what it may do to
anything else is up to its sandbox, which is the real one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest
from harness import processes, waiting
from harness.agent import Agent, Call, conversion
from harness.callers import ALICE
from harness.daemon import QEMU_IMG, Daemon
from policies import IMAGES, Grant, Policy, Root

from convertd.v1 import convert_pb2 as pb

POLICY: Final = Policy(
    limits={"stall": "5 min", "duration": "1 h", "memory": "256 MiB"},
    qemu_img="{scratch}/bin/qemu-img",
    roots=[Root("bin", "{scratch}/bin")],
    grants=[Grant(read=[IMAGES], write=[IMAGES], formats=["raw", "luks"])],
)

IMAGE_BYTES: Final = 65536
OLD: Final = b"what was there before"


@pytest.fixture(scope="module", autouse=True)
def real(scratch: Path) -> None:
    """A copy of qemu-img, with which the daemon starts."""
    (scratch / "bin").mkdir(mode=0o755)
    shutil.copy("/usr/bin/qemu-img", scratch / "bin" / "qemu-img")


@pytest.fixture(scope="module")
def alice(daemon: Daemon, scratch: Path) -> Agent:
    """Calls as uid 1234, of a daemon whose qemu-img has been replaced since its start."""
    new = scratch / "bin" / "new"
    source = Path(__file__).with_name("misbehaving.c")
    subprocess.run(["gcc", "-O1", "-o", str(new), str(source)], check=True)
    new.rename(scratch / "bin" / "qemu-img")
    return daemon.agent(ALICE)


def convert_with(alice: Agent, directory: Path, behaviour: str, *, old: bool = True) -> Call:
    """Convert an image that tells the stand-in what to do, over a file that is there."""
    source, dest = directory / "source.raw", directory / "dest.raw"
    source.write_bytes(behaviour.encode().ljust(IMAGE_BYTES, b"\0"))
    if old:
        dest.write_bytes(OLD)
        os.chown(dest, ALICE.uid, ALICE.gid)
    # With a cache mode, for a job copies what is small without qemu-img.
    request = conversion(
        source, dest, dest_format="raw", overwrite=True, cache_mode=pb.CACHE_MODE_WRITEBACK
    )
    return alice.convert(request)


def check_nothing_came_of_it(daemon: Daemon, directory: Path) -> None:
    """See that the old file is there, nothing else is, and nothing runs."""
    daemon.await_idle()
    assert sorted(os.listdir(directory)) == ["dest.raw", "source.raw"]
    assert (directory / "dest.raw").read_bytes() == OLD


FAILING: Final = {
    "hang": ("DEADLINE_EXCEEDED", "STALLED"),
    "ignore signals": ("DEADLINE_EXCEEDED", "STALLED"),
    "close outputs and hang": ("DEADLINE_EXCEEDED", "STALLED"),
    "use all time": ("DEADLINE_EXCEEDED", "DURATION_EXCEEDED"),
    "use all memory": ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY"),
    "write nothing and succeed": ("DATA_LOSS", "VERIFY_FAILED"),
    "write half and succeed": ("DATA_LOSS", "VERIFY_FAILED"),
    "shrink": ("DATA_LOSS", "VERIFY_FAILED"),
    "write half and fail": ("FAILED_PRECONDITION", "CONVERSION_FAILED"),
    "write half and crash": ("FAILED_PRECONDITION", "CONVERSION_FAILED"),
    "leave a child": ("FAILED_PRECONDITION", "CONVERSION_FAILED"),
    "start another program": ("FAILED_PRECONDITION", "CONVERSION_FAILED"),
}
"""How a call ends."""


LIMITS: Final = {"STALLED": {"stall": "3 s"}, "DURATION_EXCEEDED": {"duration": "10 s"}}
"""What the policy says while a test is about it. What a test is not about has all the time."""


@pytest.mark.parametrize("behaviour", FAILING)
def test_misbehaving_qemu_img_publishes_nothing(
    daemon: Daemon, alice: Agent, images_dir: Path, behaviour: str
) -> None:
    """And nothing of it is left running."""
    with daemon.limited(**LIMITS.get(FAILING[behaviour][1], {})):
        refusal = convert_with(alice, images_dir, behaviour).refusal()
    assert (refusal.status, refusal.reason) == FAILING[behaviour]
    check_nothing_came_of_it(daemon, images_dir)


SUCCEEDING: Final = ("progress without end", "flood stderr", "complain and succeed", "behave")


@pytest.mark.parametrize("behaviour", SUCCEEDING)
def test_misbehaving_qemu_img_output_is_harmless(
    daemon: Daemon, alice: Agent, images_dir: Path, behaviour: str
) -> None:
    """Progress goes up from 0 to 100, warnings are few and short, and the image is whole."""
    call = convert_with(alice, images_dir, behaviour)
    percents = [event.progress.percent for event in call.events() if event.HasField("progress")]
    assert percents == sorted(percents)
    assert all(0 <= percent <= 100 for percent in percents)
    warnings = call.result().warnings
    assert len(warnings) <= 16
    assert all(0 < len(warning.message) <= 512 for warning in warnings)
    assert bool(warnings) == (behaviour in {"flood stderr", "complain and succeed"})
    daemon.await_idle()
    assert (images_dir / "dest.raw").read_bytes() == (images_dir / "source.raw").read_bytes()
    assert sorted(os.listdir(images_dir)) == ["dest.raw", "source.raw"]


def encrypted(alice: Agent, directory: Path, behaviour: str) -> Call:
    """The same, to an encrypted image that is not there yet."""
    source = directory / "source.raw"
    source.write_bytes(behaviour.encode().ljust(IMAGE_BYTES, b"\0"))
    request = conversion(source, directory / "dest.raw", dest_format="luks")
    request.dest.encryption.passphrase = b"passphrase"
    return alice.convert(request)


def test_encrypted_conversion_is_repeated_if_cpu_time_was_not_measured(
    daemon: Daemon, alice: Agent, images_dir: Path
) -> None:
    """As on a busy machine, up to four times; the passphrase is there each time."""
    encrypted(alice, images_dir, "not measured four times").result()
    daemon.await_idle()
    assert sorted(os.listdir(images_dir)) == ["dest.raw", "source.raw"]


def test_number_of_repeated_conversions_is_limited(
    daemon: Daemon, alice: Agent, images_dir: Path
) -> None:
    """And the caller is told what to do."""
    refusal = encrypted(alice, images_dir, "not measured five times").refusal()
    assert refusal.reason == "CONVERSION_FAILED"
    assert "try again when the machine is less busy" in refusal.message
    daemon.await_idle()
    assert os.listdir(images_dir) == ["source.raw"]


def test_conversion_that_fails_otherwise_is_not_repeated(
    daemon: Daemon, alice: Agent, images_dir: Path
) -> None:
    """The same words, where nothing is encrypted."""
    refusal = convert_with(alice, images_dir, "not measured to raw").refusal()
    assert refusal.reason == "CONVERSION_FAILED"
    check_nothing_came_of_it(daemon, images_dir)


@pytest.mark.parametrize("behaviour", ["hang", "ignore signals", "close outputs and hang"])
def test_cancel_ends_a_misbehaving_qemu_img_at_once(
    daemon: Daemon, alice: Agent, images_dir: Path, behaviour: str
) -> None:
    """Nobody asks it: SIGKILL can't be ignored."""
    call = convert_with(alice, images_dir, behaviour)
    pid = daemon.await_one(QEMU_IMG)
    call.cancel()
    assert call.end().status == "CANCELLED"
    waiting.until(lambda: not processes.exists(pid), "it is gone")
    check_nothing_came_of_it(daemon, images_dir)


def test_qemu_img_that_writes_without_end_is_stopped_by_the_time_limit(
    daemon: Daemon, alice: Agent, images_dir: Path
) -> None:
    """It moves, so it does not stall; the duration ends it."""
    with daemon.limited(**LIMITS["DURATION_EXCEEDED"]):
        refusal = convert_with(alice, images_dir, "write for ever").refusal()
    assert (refusal.status, refusal.reason) == ("DEADLINE_EXCEEDED", "DURATION_EXCEEDED")
    check_nothing_came_of_it(daemon, images_dir)


def test_missing_qemu_img_during_operation_is_reported(
    alice: Agent, images_dir: Path, scratch: Path
) -> None:
    """As when a package is being upgraded. Afterwards it is there again."""
    program, away = scratch / "bin" / "qemu-img", scratch / "bin" / "away"
    program.rename(away)
    refusal = convert_with(alice, images_dir, "behave").refusal()
    assert (refusal.status, refusal.reason) == ("UNIMPLEMENTED", "UNSUPPORTED")
    away.rename(program)
    convert_with(alice, images_dir, "behave").result()


def test_qemu_img_that_is_not_an_elf_file_is_reported(
    daemon: Daemon, alice: Agent, images_dir: Path, scratch: Path
) -> None:
    """A script, say: only an ELF file can be confined to itself."""
    program, away = scratch / "bin" / "qemu-img", scratch / "bin" / "away"
    program.rename(away)
    program.write_text('#!/bin/sh\nexec /usr/bin/qemu-img "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    refusal = convert_with(alice, images_dir, "behave").refusal()
    assert (refusal.status, refusal.reason) == ("UNIMPLEMENTED", "UNSUPPORTED")
    assert "ELF" in refusal.message
    check_nothing_came_of_it(daemon, images_dir)
    away.rename(program)
