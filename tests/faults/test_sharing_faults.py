"""Kills, full disks and failing calls while a result is made of shared blocks: all of it, or none.

Sources and results are on one XFS or btrfs, so that only metadata is written.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from harness import images, waiting
from harness.agent import Ended, conversion
from harness.callers import ALICE, owner_of
from harness.daemon import PREFORKED_JOB, Daemon
from harness.mounts import Mounts
from harness.tracing import Tracer
from policies import Grant, Policy, Root

from convertd.v1 import convert_pb2 as pb

DISKS: Final = Root("disks", "{scratch}", mounts=True)
POLICY: Final = Policy(grants=[Grant(read=[DISKS], write=[DISKS])])

MIB: Final = images.MIB
BLOCK: Final = 4096
POOL_MIB: Final = 110
"""An XFS begins with a journal of 64 MiB."""

OLD: Final = b"what was there before"

MOST_CALLS: Final = 40
"""Of one kind a job makes fewer."""

CALLS: Final = (
    ("raw", "ioctl"),
    ("raw", "ftruncate"),
    ("qcow2", "ioctl"),
    ("qcow2", "ftruncate"),
    ("qcow2", "pwrite64"),
)
"""By which a result of shared blocks is made: FICLONE and FICLONERANGE are ioctl(2)."""

PUBLISHING: Final = tuple(("qcow2", call) for call in ("fsync", "linkat", "renameat2", "unlinkat"))


@pytest.fixture(scope="module")
def disk(scratch: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system that shares blocks, of the kind that a test names."""
    with Mounts(scratch) as mounts:
        yield mounts.on_a_loop(request.param, request.param, 512)


@pytest.fixture
def here(disk: Path, daemon: Daemon) -> Iterator[Path]:
    """A directory with nothing but a qcow2 in it; a job that has ended leaves nothing there."""
    path = disk / "here"
    path.mkdir()
    raw = images.small(disk / "small.raw")
    images.converted(raw, path / "in.qcow2", "qcow2")
    raw.unlink()
    yield path
    daemon.await_idle()
    shutil.rmtree(path)


def request(here: Path, image_format: str, reflink: pb.Reflink.ValueType) -> pb.ConvertRequest:
    """Over an old file, which is the caller's."""
    dest = here / "dest"
    if not dest.exists():
        dest.write_bytes(OLD)
        os.chown(dest, ALICE.uid, ALICE.gid)
    formats = {"source_format": "qcow2", "dest_format": image_format}
    return conversion(here / "in.qcow2", dest, overwrite=True, reflink=reflink, **formats)


def check_whole_or_old(here: Path, *, temporaries: int = 0) -> bool:
    """See that the destination is one of the two, and the source as it was. Gives if it is new."""
    dest = here / "dest"
    left = set(os.listdir(here)) - {"in.qcow2", "dest"}
    assert len(left) <= temporaries, left
    assert owner_of(dest)[:2] == (ALICE.uid, ALICE.gid)
    if dest.read_bytes()[: len(OLD)] == OLD:
        return False
    assert images.identical(here / "in.qcow2", dest)
    return True


def in_the_job(daemon: Daemon, inject: str) -> Tracer:
    """Have calls of the next job fail, and of nothing else, its qemu-img included."""
    return Tracer([daemon.await_one(PREFORKED_JOB)], inject, follow=False)


# --- kills --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("disk", "made"),
    [*itertools.product(["xfs", "btrfs"], CALLS), *(("xfs", made) for made in PUBLISHING)],
    indirect=["disk"],
    ids=lambda made: made if isinstance(made, str) else "-".join(made),
)
def test_job_killed_in_any_call_leaves_a_whole_result_or_none(
    daemon: Daemon, here: Path, made: tuple[str, str]
) -> None:
    """In the first call of a kind, in the second, and so on; and the next job is done."""
    image_format, call = made
    hit = 0
    for number in itertools.count(1):
        asked = request(here, image_format, pb.REFLINK_ALWAYS)
        with in_the_job(daemon, f"{call}:signal=KILL:when={number}") as tracer:
            ended = daemon.agent(ALICE).convert(asked).end()
            daemon.await_idle()
        # A temporary name is there from linkat(2) on, until the next job.
        check_whole_or_old(here, temporaries=1)
        if not was_killed(ended):
            break
        hit += 1
        assert number < MOST_CALLS, tracer.text
    assert hit
    daemon.agent(ALICE).convert(request(here, image_format, pb.REFLINK_ALWAYS)).result()
    assert check_whole_or_old(here)


def was_killed(ended: Ended) -> bool:
    """Whether a job that should have been killed was."""
    return ended.status != "OK" and ended.refusal().reason == "OUT_OF_MEMORY"


# --- failing calls ------------------------------------------------------------------------------

POSSIBLE: Final = {
    "ENOSPC": {"NO_SPACE"},
    "EDQUOT": {"QUOTA_EXCEEDED", "NO_SPACE"},
    "EIO": {"WRITE_FAILED", "READ_FAILED", "REFLINK_NOT_POSSIBLE"},
}
"""How a call may end in which a system call fails so."""


@pytest.mark.parametrize("disk", ["xfs"], indirect=True)
@pytest.mark.parametrize("error", POSSIBLE)
@pytest.mark.parametrize("made", CALLS, ids="-".join)
def test_failing_call_leaves_a_whole_result_or_none(
    daemon: Daemon, here: Path, made: tuple[str, str], error: str
) -> None:
    """Which of the calls it may be. Where sharing is not demanded, some lead to a copy."""
    image_format, call = made
    # A try at sharing fails by ioctl(2) alone.
    for reflink in (pb.REFLINK_ALWAYS, pb.REFLINK_AUTO)[: 1 + (call == "ioctl")]:
        for number in itertools.count(1):
            asked = request(here, image_format, reflink)
            with in_the_job(daemon, f"{call}:error={error}:when={number}") as tracer:
                ended = daemon.agent(ALICE).convert(asked).end()
                daemon.await_idle()
            is_new = check_whole_or_old(here)
            if ended.status != "OK":
                assert ended.refusal().reason in POSSIBLE[error], ended.refusal()
            else:
                assert is_new
                (here / "dest").unlink()
            if not tracer.injected:
                break
            assert number < MOST_CALLS, tracer.text


# --- full disks ---------------------------------------------------------------------------------


@pytest.fixture
def alone(daemon: Daemon, scratch: Path) -> Iterator[Mounts]:
    """File systems of one test's own: it fills them."""
    with Mounts(scratch) as made:
        yield made
        daemon.await_idle()


def fill(directory: Path, leave_bytes: int) -> None:
    """Take all the room of a file system but that."""
    with (directory / "fill").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(MIB)):
            pass
    with (directory / "fill").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(BLOCK)):
            pass
    os.truncate(directory / "fill", (directory / "fill").stat().st_size - leave_bytes)
    subprocess.run(["sync", "-f", directory], check=True)


@pytest.mark.parametrize("reflink", [pb.REFLINK_AUTO, pb.REFLINK_ALWAYS], ids=pb.Reflink.Name)
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_disk_without_room_for_the_tables_of_a_result_gets_none(
    daemon: Daemon, alone: Mounts, kind: str, reflink: pb.Reflink.ValueType
) -> None:
    """A copy would need more. All that was free is free again."""
    here = alone.on_a_loop(kind, "full")
    raw = images.small(here / "small.raw")
    images.converted(raw, here / "in.qcow2", "qcow2")
    asked = request(here, "qcow2", reflink)
    fill(here, 16 * BLOCK)
    names, free = set(os.listdir(here)), os.statvfs(here).f_bfree
    refusal = daemon.agent(ALICE).convert(asked).refusal()
    assert (refusal.status, refusal.reason) == ("RESOURCE_EXHAUSTED", "NO_SPACE")
    assert refusal.metadata["mount_point"] == str(here)
    daemon.await_idle()
    assert set(os.listdir(here)) == names
    assert (here / "dest").read_bytes() == OLD
    subprocess.run(["sync", "-f", here], check=True)
    waiting.until(lambda: os.statvfs(here).f_bfree >= free, "what was free is free")


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_thin_disk_without_room_for_metadata_has_a_whole_result_or_the_old_file(
    daemon: Daemon, alone: Mounts, image_format: str
) -> None:
    """The file system has room as far as it knows; the disk below it has none but its journal's."""
    pool = alone.in_memory("tmpfs", "pool", f"mode=755,size={POOL_MIB}m")
    with Mounts(pool) as thin:
        here = thin.on_a_loop("xfs", "disk", 1024)
        raw = images.small(here / "small.raw")
        images.converted(raw, here / "in.qcow2", "qcow2")
        raw.unlink()
        asked = request(here, image_format, pb.REFLINK_ALWAYS)
        subprocess.run(["sync", "-f", here], check=True)
        with contextlib.suppress(OSError), (pool / "fill").open("wb", buffering=0) as file:
            while file.write(bytes(MIB)):
                pass
        ended = daemon.agent(ALICE).convert(asked).end()
        daemon.await_idle()
        if ended.status != "OK" or image_format == "qcow2":
            assert ended.refusal().reason in {"NO_SPACE", "WRITE_FAILED"}
            assert ended.refusal().metadata["path"] == str(here / "dest")
        subprocess.run(["umount", here], check=True)
        (pool / "fill").unlink()
        subprocess.run(["mount", "-o", "loop,nouuid", pool / ".disk.xfs", here], check=True)
        assert check_whole_or_old(here) is (ended.status == "OK")
