"""Sources that are rewritten while a result comes to share their blocks: one moment, or none.

Nobody can change the snapshot that a job reads: so the image's tables and its data fit together.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from harness import images
from harness.agent import conversion
from harness.callers import ALICE, PYTHON
from harness.daemon import PREFORKED_JOB, Daemon
from harness.mounts import Mounts
from harness.tracing import Tracer
from hostile import simple_calls
from policies import Grant, Policy, Root

from convertd.v1 import convert_pb2 as pb

DISKS: Final = Root("disks", "{scratch}", mounts=True)
POLICY: Final = Policy(grants=[Grant(read=[DISKS], write=[DISKS])])

MIB: Final = images.MIB
SIZE: Final = 4 * MIB
HELD_MS: Final = 400
"""How long strace holds the job in front of each ioctl(2): FICLONE is one."""

ROUNDS: Final = int(os.environ.get("CONVERTD_TEST_RACES", "25"))

REWRITE: Final = """
import itertools, os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR)
size = os.fstat(fd).st_size
print("began", flush=True)
for number in itertools.count():
    os.pwrite(fd, bytes([number % 255 + 1]) * size, 0)
    time.sleep(0.1)
"""
"""Rewrite all of a file by one call after the other, each with one byte's value.

The pauses are longer than a job takes from opening a file to its snapshot, so that some succeed.
"""


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def disk(mounts: Mounts, request: pytest.FixtureRequest) -> Path:
    """A file system that shares blocks, whose directory is Alice's."""
    point = mounts.on_a_loop(request.param, request.param, 512)
    os.chown(point, ALICE.uid, ALICE.gid)
    return point


@pytest.fixture
def source(disk: Path, daemon: Daemon) -> Iterator[Path]:
    """A raw image of Alice's of one byte's value; whatever is made there goes."""
    assert daemon.is_running
    yield simple_calls.file_of(ALICE, disk / "in.raw", b"\x01" * SIZE)
    for path in disk.iterdir():
        path.unlink()


def test_source_rewritten_after_the_snapshot_does_not_change_the_result(
    daemon: Daemon, source: Path
) -> None:
    """The job has said how it will share blocks, and is held before it does."""
    image = images.converted(source, source.with_suffix(".qcow2"), "qcow2")
    os.chown(image, ALICE.uid, ALICE.gid)
    for image_format in ("raw", "qcow2"):
        dest = source.with_name(f"out.{image_format}")
        request = conversion(
            image,
            dest,
            source_format="qcow2",
            dest_format=image_format,
            reflink=pb.REFLINK_ALWAYS,
        )
        with Tracer(
            [daemon.await_one(PREFORKED_JOB)], f"ioctl:delay_enter={HELD_MS * 1000}", follow=False
        ):
            call = daemon.agent(ALICE).convert(request)
            call.await_started()
            kept = image.read_bytes()
            image.write_bytes(b"\xff" * len(kept))
            call.result()
        image.write_bytes(kept)
        assert images.identical(source, dest)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_source_rewritten_all_the_time_gives_one_moment_of_it_or_is_refused(
    daemon: Daemon, source: Path, image_format: str
) -> None:
    """Never bytes of two moments."""
    dest = source.with_name("dest")
    argv = [PYTHON, "-c", REWRITE, str(source)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as rewriting:
        assert rewriting.stdout is not None
        assert rewriting.stdout.readline() == b"began\n"
        done = 0
        for _ in range(ROUNDS):
            request = conversion(source, dest, dest_format=image_format, reflink=pb.REFLINK_ALWAYS)
            answer = simple_calls.outcome_of(daemon.agent(ALICE).convert(request))
            if answer.is_ok:
                assert len(set(data_of(dest, image_format))) == 1
                dest.unlink()
                done += 1
            else:
                assert answer.reason in {"SOURCE_CHANGED", "REFLINK_NOT_POSSIBLE"}
            assert not dest.exists()
        rewriting.terminate()
    assert done


def data_of(path: Path, image_format: str) -> bytes:
    """What a guest would read."""
    raw = path.with_name("read.raw")
    argv = ["qemu-img", "convert", "-f", image_format, "-O", "raw", str(path), str(raw)]
    subprocess.run(argv, check=True)
    data = raw.read_bytes()
    raw.unlink()
    return data
