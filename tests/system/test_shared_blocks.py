"""Results that share blocks with their source: asked for on the real socket."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from harness import images, waiting
from harness.agent import Agent, conversion
from harness.callers import ALICE, CONVERTCTL, ROOT, Ran
from harness.daemon import Daemon
from harness.fixtures import FillPolicy
from harness.mounts import Mounts
from loop_devices import Devices
from policies import LIBRARY, VOLUMES, Grant, Policy, Root

from convertd.v1 import convert_pb2 as pb
from convertd_daemon.job.files import paths
from convertd_daemon.linux import locks

DISKS: Final = Root("disks", "{scratch}", mounts=True)
POLICY: Final = Policy(
    operators=[0], grants=[Grant(read=[LIBRARY, DISKS, VOLUMES], write=[DISKS, VOLUMES])]
)

FORBIDDEN: Final = POLICY.with_root(dataclasses.replace(DISKS, reflink=False))

ROOMY_MIB: Final = 64


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def disk(mounts: Mounts, request: pytest.FixtureRequest) -> Path:
    """A file system that shares blocks, with an image on it."""
    point = mounts.on_a_loop(request.param, request.param, ROOMY_MIB)
    images.small(point / "in.raw")
    return point


@pytest.fixture
def alice(disk: Path, daemon: Daemon) -> Agent:
    """Calls as uid 1234. The mounts come first: they are taken away when the daemon is gone."""
    assert disk.is_mount()
    return daemon.agent(ALICE)


@pytest.fixture
def dest(disk: Path) -> Path:
    """Where the result will be; nothing is there yet, nor a temporary."""
    path = disk / "out"
    path.unlink(missing_ok=True)
    assert sorted(os.listdir(disk)) == ["in.raw"]
    return path


def to_raw(
    source: Path,
    dest: Path,
    **fields: Any,  # noqa: ANN401 - the messages check their fields
) -> pb.ConvertRequest:
    """A request for a raw result."""
    return conversion(source, dest, dest_format="raw", **fields)


def shared_extents(path: Path) -> list[bool]:
    """Of each extent of a file, whether the file system shares it."""
    told = subprocess.run(
        ["filefrag", "-v", str(path)], check=True, capture_output=True, text=True
    ).stdout
    return ["shared" in line for line in told.splitlines() if line.lstrip()[:1].isdigit()]


@pytest.mark.parametrize("reflink", [pb.REFLINK_UNSPECIFIED, pb.REFLINK_AUTO, pb.REFLINK_ALWAYS])
def test_blocks_are_shared_and_the_reply_says_so(
    alice: Agent, disk: Path, dest: Path, reflink: pb.Reflink
) -> None:
    """Unless something else is asked for: in the plan and in the result, and no warning."""
    call = alice.convert(to_raw(disk / "in.raw", dest, reflink=reflink))
    plan = call.await_started().plan
    assert plan.method == pb.METHOD_REFLINK
    assert plan.method_reason
    assert plan.needed_bytes == 0
    result = call.result()
    assert result.method == pb.METHOD_REFLINK
    assert 0 < result.shared_bytes <= result.allocated_size_bytes
    assert result.shared_bytes + result.written_bytes == result.allocated_size_bytes
    assert not result.warnings
    assert images.identical(disk / "in.raw", dest)
    assert all(shared_extents(dest))


def test_request_for_a_copy_shares_nothing(alice: Agent, disk: Path, dest: Path) -> None:
    """Each block is the result's own."""
    call = alice.convert(to_raw(disk / "in.raw", dest, reflink=pb.REFLINK_NEVER))
    plan = call.await_started().plan
    assert plan.method == pb.METHOD_COPY
    result = call.result()
    assert (result.method, result.shared_bytes) == (pb.METHOD_COPY, 0)
    assert result.written_bytes == result.allocated_size_bytes > 0
    assert images.identical(disk / "in.raw", dest)
    assert not any(shared_extents(dest))


@pytest.mark.parametrize("validate_only", [False, True], ids=["convert", "validate"])
def test_sharing_that_is_demanded_and_not_possible_is_refused(
    alice: Agent, library: Path, dest: Path, *, validate_only: bool
) -> None:
    """With the reason, and before anything is written."""
    request = to_raw(
        library / "small.raw", dest, reflink=pb.REFLINK_ALWAYS, validate_only=validate_only
    )
    call = alice.convert(request)
    refusal = call.refusal()
    assert (refusal.status, refusal.reason) == ("FAILED_PRECONDITION", "REFLINK_NOT_POSSIBLE")
    assert refusal.metadata == {
        "path": str(dest),
        "problem": "source and destination are in different file systems",
    }
    assert not any(
        pb.ConvertResponse.FromString(event).HasField("started") for event in call.messages
    )
    assert not dest.exists()


def test_block_device_at_either_end_shares_nothing(
    alice: Agent, disk: Path, dest: Path, volumes: Devices
) -> None:
    """It has no file system's blocks; the refusal names the device."""
    volume = volumes.add(f"lv-{len(os.listdir(volumes.links))}", 16 * images.MIB)
    for source, target in ((disk / "in.raw", volume), (volume, dest)):
        request = to_raw(source, target, reflink=pb.REFLINK_ALWAYS)
        refusal = alice.convert(request).refusal()
        assert (refusal.status, refusal.reason) == ("FAILED_PRECONDITION", "REFLINK_NOT_POSSIBLE")
        assert refusal.metadata["path"] == str(volume)
        request.reflink = pb.REFLINK_AUTO
        assert alice.convert(request).result().method == pb.METHOD_QEMU_IMG


@pytest.mark.parametrize(
    ("fields", "obstacle"),
    [
        ({"compression": pb.COMPRESSION_ZLIB}, "compression"),
        ({"preallocation": pb.PREALLOCATION_METADATA}, "preallocation"),
        ({"encryption": pb.DestinationEncryption(passphrase=b"secret")}, "encryption"),
    ],
    ids=["compression", "preallocation", "encryption"],
)
def test_request_that_demands_sharing_and_writing_is_invalid(
    alice: Agent, disk: Path, dest: Path, fields: dict[str, Any], obstacle: str
) -> None:
    """Whatever the files are."""
    request = conversion(disk / "in.raw", dest, reflink=pb.REFLINK_ALWAYS, **fields)
    refusal = alice.convert(request).refusal()
    assert (refusal.status, refusal.reason) == ("INVALID_ARGUMENT", "BAD_OPTION")
    assert refusal.metadata == {
        "field": "reflink",
        "problem": f"always does not go with {obstacle}",
    }


@contextlib.contextmanager
def open_in_qemu(image: Path) -> Iterator[None]:
    """Have a qemu open a raw image for writing, as for a guest."""
    argv = ["qemu-io", "-f", "raw", str(image)]
    with (
        image.open("rb") as file,
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as qemu,
    ):
        waiting.until(
            lambda: locks.is_locked(file.fileno(), *paths.QEMU_LOCKS), "qemu has locked the image"
        )
        yield
        qemu.communicate(b"quit\n")


@pytest.mark.parametrize("reflink", [pb.REFLINK_AUTO, pb.REFLINK_NEVER, pb.REFLINK_ALWAYS])
def test_disk_of_a_running_guest_is_refused_with_each_method(
    alice: Agent, disk: Path, dest: Path, reflink: pb.Reflink
) -> None:
    """What the guest has not flushed yet would be missing."""
    with open_in_qemu(disk / "in.raw"):
        refusal = alice.convert(to_raw(disk / "in.raw", dest, reflink=reflink)).refusal()
    assert (refusal.reason, refusal.metadata) == (
        "IMAGE_IN_USE",
        {"path": str(disk / "in.raw")},
    )
    assert not dest.exists()


def test_policy_forbids_sharing_from_the_next_reload_on(
    daemon: Daemon, alice: Agent, disk: Path, dest: Path, fill_in: FillPolicy
) -> None:
    """A request then gets a copy, or a refusal if it demands sharing."""
    request = to_raw(disk / "in.raw", dest, overwrite=True)
    assert alice.convert(request).result().method == pb.METHOD_REFLINK
    daemon.reload(fill_in(FORBIDDEN))
    try:
        assert alice.convert(request).result().method == pb.METHOD_COPY
        reason = "the policy does not allow it in the root disks"
        large = to_raw(disk / "in.raw", dest, overwrite=True, cache_mode=pb.CACHE_MODE_WRITEBACK)
        copied = alice.convert(large)
        assert copied.await_started().plan.method_reason == reason
        assert copied.result().method == pb.METHOD_QEMU_IMG
        request.reflink = pb.REFLINK_ALWAYS
        refusal = alice.convert(request).refusal()
        assert (refusal.reason, refusal.metadata["problem"]) == ("REFLINK_NOT_POSSIBLE", reason)
    finally:
        daemon.reload(fill_in(POLICY))
    assert alice.convert(request).result().method == pb.METHOD_REFLINK


def test_record_and_counters_have_the_method_and_what_is_shared(
    daemon: Daemon, alice: Agent, disk: Path, dest: Path
) -> None:
    """By method, for one is not as quick as the other."""

    def counted() -> dict[int, tuple[int, int]]:
        stats = daemon.agent(ROOT).ask("GetStats", pb.GetStatsRequest(), pb.GetStatsResponse)
        return {
            item.method: (item.count, item.shared_bytes)
            for item in stats.conversions
            if not item.reason
        }

    daemon.await_idle()
    before = counted().get(pb.METHOD_REFLINK, (0, 0))
    result = alice.convert(to_raw(disk / "in.raw", dest, label="counted")).result()
    expected = (before[0] + 1, before[1] + result.shared_bytes)
    # It is counted after the caller has its answer.
    waiting.until(lambda: counted()[pb.METHOD_REFLINK] == expected, "the count")
    record = [line for line in daemon.log.splitlines() if "label=counted" in line][-1]
    assert f"method=reflink bytes={8 * images.MIB} " in record
    assert f" shared_bytes={result.shared_bytes} " in record
    copy = to_raw(disk / "in.raw", dest, reflink=pb.REFLINK_NEVER, overwrite=True)
    alice.convert(copy).result()
    waiting.until(lambda: pb.METHOD_COPY in counted(), "the count")
    assert counted()[pb.METHOD_COPY][1] == 0


def test_convertctl_says_how_a_result_is_made(daemon: Daemon, disk: Path, dest: Path) -> None:
    """Before with --dry-run, afterwards, and for programs."""

    def convertctl(*options: str) -> Ran:
        ends = (str(disk / "in.raw"), str(dest), "-f", "raw", "-O", "raw")
        return ALICE.convertctl(daemon.socket, "convert", *ends, *options)

    planned = convertctl("--dry-run").out
    assert "  method       reflink: " in planned
    assert "  needs        nothing" in planned
    assert "cache" not in planned
    assert convertctl("--reflink", "sometimes").status == 2
    copied = json.loads(convertctl("--reflink", "never", "--json").out.splitlines()[-1])
    assert (copied["method"], copied["plan"]["method"]) == ("copy", "copy")
    shared = json.loads(
        convertctl("--reflink", "always", "--overwrite", "--json").out.splitlines()[-1]
    )
    assert (shared["method"], shared["written_bytes"]) == ("reflink", 0)
    assert " of it shared with the source" in convertctl("--overwrite").out
    refused = convertctl("--overwrite", "--reflink", "always", "--preallocation", "full")
    assert "reflink: always does not go with preallocation (BAD_OPTION)" in refused.err


def test_blocks_are_shared_without_a_daemon(disk: Path) -> None:
    """By the caller's own rights."""
    own = disk / "own"
    own.mkdir()
    source, dest = images.small(own / "in.raw"), own / "out.raw"
    for path in (own, source):
        os.chown(path, ALICE.uid, ALICE.gid)
    ends = (str(source), str(dest), "-f", "raw", "-O", "raw")
    ran = ALICE.run([CONVERTCTL, "convert", "--local", *ends, "--reflink", "always"])
    assert ran.status == 0, ran.err
    assert images.identical(source, dest)
    assert all(shared_extents(dest))
    shutil.rmtree(own)
