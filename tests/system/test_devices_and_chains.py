"""Volumes, images that stand on others, and encrypted ones: asked for on the real socket."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
from harness import images, waiting
from harness.agent import Agent, Refusal, conversion
from harness.callers import ALICE, ROOT, owner_of
from harness.daemon import Daemon
from loop_devices import DISK_GROUP, Devices
from policies import IMAGES, LIBRARY, VOLUMES, Grant, Policy, Root

from convertd.v1 import convert_pb2 as pb

BASES: Final = Root("bases", "{scratch}/bases")
POLICY: Final = Policy(
    operators=[0],
    grants=[
        Grant(
            read=[LIBRARY, IMAGES, BASES, VOLUMES],
            write=[IMAGES, VOLUMES],
            formats=["raw", "qcow2", "luks"],
        )
    ],
)

MIB: Final = 1024 * 1024


@pytest.fixture
def alice(daemon: Daemon) -> Agent:
    """Calls as uid 1234."""
    return daemon.agent(ALICE)


@pytest.fixture
def volume(volumes: Devices) -> Path:
    """A volume of 16 MiB without a zero on it."""
    return volumes.add(f"lv-{len(os.listdir(volumes.links))}", 16 * MIB)


@pytest.fixture
def source(library: Path) -> Path:
    """A raw image of 8 MiB."""
    return library / "small.raw"


def to_volume(
    source: Path,
    volume: Path,
    **fields: Any,  # noqa: ANN401 - the messages check their fields
) -> pb.ConvertRequest:
    """A request to write a volume."""
    return conversion(source, volume, dest_format="raw", **fields)


# --- volumes ------------------------------------------------------------------------------------


def test_image_is_converted_to_a_volume_and_back(
    alice: Agent, volumes: Devices, volume: Path, source: Path, images_dir: Path
) -> None:
    """Of what was on it nothing is left. It keeps its owner and its mode."""
    before = volume.stat()
    result = alice.convert(to_volume(source, volume)).result()
    assert result.published
    assert result.allocated_size_bytes == 0
    assert volumes.bytes_on(volume) == source.read_bytes().ljust(16 * MIB, b"\0")
    after = volume.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )
    back = images_dir / "back.qcow2"
    alice.convert(conversion(volume, back)).result()
    assert images.identical(volume, back)
    assert owner_of(back) == (ALICE.uid, ALICE.gid, 0o600)


def refused(alice: Agent, request: pb.ConvertRequest, status: str, reason: str) -> Refusal:
    """The refusal, whose message has all its values."""
    refusal = alice.convert(request).refusal()
    assert (refusal.status, refusal.reason) == (status, reason)
    assert all(value in refusal.message for value in refusal.metadata.values())
    return refusal


def test_volume_that_is_too_small_is_refused_with_both_sizes(
    alice: Agent, volumes: Devices, source: Path
) -> None:
    """Before a byte is written."""
    volume = volumes.add("small", 4 * MIB)
    request = to_volume(source, volume)
    refusal = refused(alice, request, "FAILED_PRECONDITION", "DEVICE_TOO_SMALL")
    assert refusal.metadata == {
        "path": str(volume),
        "size_bytes": str(4 * MIB),
        "needed_bytes": str(8 * MIB),
    }
    assert volumes.bytes_on(volume) == b"\xaa" * (4 * MIB)


def test_volume_its_group_may_not_write_is_refused_with_its_mode(
    alice: Agent, volume: Path, source: Path
) -> None:
    """For whoever sets the modes of devices."""
    os.chmod(volume, 0o640)
    request = to_volume(source, volume)
    refusal = refused(alice, request, "FAILED_PRECONDITION", "DEVICE_NOT_WRITABLE")
    assert refusal.metadata == {"path": str(volume), "group": str(DISK_GROUP), "mode": "0640"}


def test_zero_claim_for_a_volume_is_refused_unless_the_root_allows_it(
    alice: Agent, volumes: Devices, volume: Path, source: Path
) -> None:
    """Unless the root allows the claim: a former tenant's blocks would be left."""
    request = to_volume(source, volume, is_zero=True)
    refusal = refused(alice, request, "PERMISSION_DENIED", "CLAIM_NOT_ALLOWED")
    assert refusal.metadata == {"path": str(volume)}
    assert volumes.bytes_on(volume) == b"\xaa" * (16 * MIB)


def test_mounted_volume_is_refused_as_in_use(
    alice: Agent, volumes: Devices, source: Path, scratch: Path, images_dir: Path
) -> None:
    """At either end."""
    volume = volumes.add("mounted", 32 * MIB, dirty=False)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(volume)], check=True)
    point = scratch / "point"
    point.mkdir()
    subprocess.run(["mount", str(volume), str(point)], check=True)
    try:
        for request in (
            to_volume(source, volume),
            conversion(volume, images_dir / "dest.qcow2"),
        ):
            refusal = refused(alice, request, "FAILED_PRECONDITION", "IMAGE_IN_USE")
            assert refusal.metadata == {"path": str(volume)}
    finally:
        subprocess.run(["umount", str(point)], check=True)
    assert os.listdir(images_dir) == []


def test_missing_volume_is_not_created_as_a_file(
    alice: Agent, volumes: Devices, source: Path
) -> None:
    """A file in its place would fill /dev."""
    gone = volumes.links / "gone"
    refused(alice, to_volume(source, gone), "NOT_FOUND", "SOURCE_NOT_FOUND")
    assert not gone.exists()


def test_interrupted_write_to_a_volume_reports_its_content_as_undefined(
    daemon: Daemon, alice: Agent, volumes: Devices, library: Path
) -> None:
    """There is one copy of it, and that was being written."""
    volume = volumes.add("large", 64 * MIB)
    request = to_volume(library / "bulky.raw", volume, rate_limit_bytes_per_second=MIB)
    call = alice.convert(request)
    call.await_event(lambda event: event.progress.percent > 0)
    (job,) = alice.jobs()
    daemon.agent(ROOT).cancel_job(job.job_id)
    refusal = call.refusal()
    assert (refusal.status, refusal.reason) == ("ABORTED", "CANCELLED_BY_OPERATOR")
    assert refusal.metadata == {"device": str(volume), "device_content": "undefined"}
    waiting.until(lambda: not alice.jobs(), "the job has ended")


# --- chains -------------------------------------------------------------------------------------


def test_backing_chain_over_several_roots_and_owners_becomes_one_image(
    alice: Agent, source: Path, scratch: Path, images_dir: Path
) -> None:
    """What a live snapshot of Nova's is: an overlay of the guest's on a base of the cache's."""
    base = images.converted(source, scratch / "bases" / "base.qcow2", "qcow2")
    middle, top = images_dir / "middle.qcow2", images_dir / "top.qcow2"
    over(middle, str(base), "write -P 1 0 65536")
    over(top, middle.name, "write -P 2 1M 65536")
    os.chown(middle, 4321, 4321)
    request = conversion(top, images_dir / "flat.qcow2", source_format="qcow2", verify=True)
    call = alice.convert(request)
    members = call.await_started().plan.chain
    assert [member.path for member in members] == [str(top), str(middle), str(base)]
    assert call.result().verified
    flat = images_dir / "flat.qcow2"
    assert images.identical(top, flat)
    argv = ["qemu-img", "info", "--output=json", str(flat)]
    output = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    assert "backing-filename" not in output
    shown = alice.ask(
        "Inspect", pb.InspectRequest(source=pb.Source(path=str(top))), pb.InspectResponse
    )
    assert [member.path for member in shown.backing_chain] == [str(middle), str(base)]
    assert (shown.backing_filename, shown.backing_format) == ("middle.qcow2", "qcow2")
    assert shown.backing_chain_complete


def over(path: Path, base: str, written: str) -> None:
    """An overlay that was written to, readable by its owner alone."""
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, str(path)]
    subprocess.run(argv, check=True)
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", written, str(path)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    path.chmod(0o600)


# --- passphrases --------------------------------------------------------------------------------


def test_encrypted_image_without_a_passphrase_is_refused_as_such(
    alice: Agent, source: Path, images_dir: Path
) -> None:
    """Not "invalid": it is a passphrase that is missing. With it the image is read."""
    request = conversion(source, images_dir / "locked.qcow2")
    request.dest.encryption.passphrase = b"correct horse"
    request.dest.encryption.iter_time_milliseconds = 10
    alice.convert(request).result()
    again = conversion(
        images_dir / "locked.qcow2",
        images_dir / "plain.raw",
        source_format="qcow2",
        dest_format="raw",
    )
    refusal = refused(alice, again, "INVALID_ARGUMENT", "SECRET_MISSING")
    assert refusal.metadata == {"path": str(images_dir / "locked.qcow2")}
    again.source.encryption.passphrase = b"correct horse"
    alice.convert(again).result()
    assert images.identical(source, images_dir / "plain.raw")
