"""What a caller can ask for, and gets: formats, compression, overwriting, and more."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any, Final

import pytest
from harness import images
from harness.agent import Agent, conversion
from harness.callers import ALICE, BOB, owner_of
from harness.daemon import Daemon
from policies import IMAGES, LIBRARY, Grant, Policy, Root

from convertd.v1 import convert_pb2 as pb

POLICY: Final = Policy(
    roots=[Root("shared", "{scratch}/shared")],
    grants=[
        Grant(
            read=[LIBRARY, IMAGES],
            write=[IMAGES],
            formats=["raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx", "qed", "parallels"],
        ),
        Grant(users=[1235], read=[LIBRARY], write=[IMAGES], overwrite="any"),
    ],
)

MIB: Final = 1024 * 1024


@pytest.fixture
def alice(daemon: Daemon) -> Agent:
    """Calls as uid 1234, who may overwrite its own files."""
    return daemon.agent(ALICE)


@pytest.fixture
def source(library: Path) -> Path:
    """A raw image of 8 MiB."""
    return library / "small.raw"


def info(path: Path) -> dict[str, Any]:
    """What qemu-img says of an image."""
    argv = ["qemu-img", "info", "--output=json", str(path)]
    done = subprocess.run(argv, check=True, capture_output=True)
    output: dict[str, Any] = json.loads(done.stdout)
    return output


# --- what is said of a conversion ---------------------------------------------------------------


def test_conversion_streams_its_plan_progress_and_result(
    alice: Agent, source: Path, images_dir: Path
) -> None:
    """One started, one result, the same job in all, and percentages that never fall."""
    dest = images_dir / "dest.qcow2"
    events = list(alice.convert(conversion(source, dest, label="nightly")).events())
    kinds = [event.WhichOneof("event") for event in events]
    assert (kinds[0], kinds[-1]) == ("progress", "result")
    assert (kinds.count("started"), kinds.count("result")) == (1, 1)
    progress = [event.progress for event in events if event.HasField("progress")]
    started, result = events[kinds.index("started")].started, events[-1].result
    assert {one.job_id for one in progress} == {started.job_id} == {result.job_id}
    assert [one.phase for one in progress] == sorted(one.phase for one in progress)
    assert [one.percent for one in progress] == sorted(one.percent for one in progress)
    assert (started.plan.source_format, started.plan.dest_format) == ("raw", "qcow2")
    assert started.plan.virtual_size_bytes == result.virtual_size_bytes == 8 * MIB
    assert started.plan.needed_bytes == source.stat().st_blocks * 512
    assert result.published
    assert result.allocated_size_bytes == dest.stat().st_blocks * 512
    assert result.elapsed_seconds >= result.queued_seconds > 0
    assert not result.warnings


def test_plan_command_names_the_paths_of_the_caller(
    alice: Agent, source: Path, images_dir: Path
) -> None:
    """It is for people: descriptors of a process that is gone say nothing."""
    dest = images_dir / "dest.qcow2"
    call = alice.convert(conversion(source, dest, validate_only=True))
    command = list(call.await_started().plan.command)
    assert command[:2] == ["qemu-img", "convert"]
    assert command[-2:] == [str(source), str(dest)]
    assert not any("/proc/" in argument for argument in command)


# --- formats ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image_format", ["qcow2", "vmdk", "vdi", "vpc", "vhdx", "qed", "parallels"]
)
def test_image_is_identical_after_conversion_through(
    alice: Agent, source: Path, images_dir: Path, image_format: str
) -> None:
    """Every format of one file, written by the sandboxed qemu-img and read by it."""
    there, back = images_dir / f"there.{image_format}", images_dir / "back.raw"
    alice.convert(conversion(source, there, dest_format=image_format)).result()
    assert info(there)["format"] == image_format
    request = conversion(there, back, source_format=image_format, dest_format="raw")
    alice.convert(request).result()
    assert images.identical(source, back)


def test_unstated_source_format_is_detected(alice: Agent, images_dir: Path) -> None:
    """By qemu-img, in the sandbox."""
    source = images.created(images_dir / "source", "qcow2", 4)
    dest = images_dir / "dest.raw"
    result = alice.convert(conversion(source, dest, source_format="", dest_format="raw")).result()
    assert result.source_format == "qcow2"
    assert dest.stat().st_size == 4 * MIB


def test_source_stated_as_raw_is_read_as_raw_whatever_its_content(
    alice: Agent, images_dir: Path
) -> None:
    """A guest can write any header into its disk; it is data."""
    source = images.created(images_dir / "source", "qcow2", 4)
    dest = images_dir / "dest.raw"
    alice.convert(conversion(source, dest, dest_format="raw")).result()
    assert dest.read_bytes().rstrip(b"\0") == source.read_bytes().rstrip(b"\0")


@pytest.mark.parametrize("image_format", ["qcow2", "vmdk", "vdi", "parallels"])
@pytest.mark.parametrize("stated", [True, False], ids=["stated", "found"])
def test_truncated_image_is_refused(
    alice: Agent, images_dir: Path, image_format: str, *, stated: bool
) -> None:
    """Half of it must not become a whole disk, though qemu reads the rest as zeroes."""
    raw = images.bulky(images_dir / "bulky")
    source = images.converted(raw, images_dir / "half", image_format)
    os.truncate(source, source.stat().st_size // 2)
    dest = images_dir / "dest.raw"
    known = image_format if stated else ""
    refusal = alice.convert(
        conversion(source, dest, source_format=known, dest_format="raw")
    ).refusal()
    assert (refusal.status, refusal.reason) == ("FAILED_PRECONDITION", "IMAGE_REFUSED")
    assert refusal.metadata["path"] == str(source)
    assert not dest.exists()


def test_empty_source_becomes_an_empty_image(alice: Agent, images_dir: Path) -> None:
    """Of no virtual size."""
    source = images_dir / "source.raw"
    source.touch()
    result = alice.convert(conversion(source, images_dir / "dest.qcow2")).result()
    assert result.virtual_size_bytes == 0
    assert info(images_dir / "dest.qcow2")["virtual-size"] == 0


def test_snapshots_not_copied_are_reported_in_a_warning(alice: Agent, images_dir: Path) -> None:
    """In a warning, for qemu-img says nothing about them."""
    source = images.created(images_dir / "source.qcow2", "qcow2", 4)
    subprocess.run(["qemu-img", "snapshot", "-c", "before", str(source)], check=True)
    request = conversion(source, images_dir / "dest.qcow2", source_format="qcow2")
    (warning,) = alice.convert(request).result().warnings
    assert warning.reason == "SNAPSHOTS_DROPPED"


# --- compression, preallocation -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("compression", "kind"),
    [
        (pb.COMPRESSION_DEFAULT, "zlib"),
        (pb.COMPRESSION_ZLIB, "zlib"),
        (pb.COMPRESSION_ZSTD, "zstd"),
    ],
    ids=["default", "zlib", "zstd"],
)
def test_result_is_compressed_by(
    alice: Agent, source: Path, images_dir: Path, compression: pb.Compression, kind: str
) -> None:
    """And takes less space than the image does."""
    dest = images_dir / "dest.qcow2"
    call = alice.convert(conversion(source, dest, compression=compression))
    call.result()
    assert info(dest)["format-specific"]["data"]["compression-type"] == kind
    assert dest.stat().st_blocks < source.stat().st_blocks
    assert images.identical(source, dest)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [(("-c",), "zlib"), (("--compression", "zstd"), "zstd")],
    ids=["-c", "--compression zstd"],
)
def test_convertctl_compresses_with(
    daemon: Daemon, source: Path, images_dir: Path, arguments: tuple[str, ...], kind: str
) -> None:
    """The policy's default is zlib."""
    dest = images_dir / "dest.qcow2"
    words = ("convert", str(source), str(dest), "-f", "raw", "-O", "qcow2", *arguments)
    ran = ALICE.convertctl(daemon.socket, *words)
    assert ran.status == 0, ran
    assert info(dest)["format-specific"]["data"]["compression-type"] == kind


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize(
    "preallocation", [pb.PREALLOCATION_FALLOC, pb.PREALLOCATION_FULL], ids=["falloc", "full"]
)
def test_preallocation_reserves_all_space_for(
    alice: Agent,
    source: Path,
    images_dir: Path,
    image_format: str,
    preallocation: pb.Preallocation,
) -> None:
    """All of the virtual size is allocated, though the source has a hole."""
    dest = images_dir / "dest"
    request = conversion(source, dest, dest_format=image_format, preallocation=preallocation)
    alice.convert(request).result()
    assert source.stat().st_blocks * 512 < 8 * MIB <= dest.stat().st_blocks * 512
    assert images.identical(source, dest)


# --- validate_only, verify, rate limit ----------------------------------------------------------


def test_validation_returns_the_plan_and_writes_nothing(
    alice: Agent, source: Path, images_dir: Path
) -> None:
    """Every check, the whole plan, and no file."""
    call = alice.convert(conversion(source, images_dir / "dest.qcow2", validate_only=True))
    result = call.result()
    assert not result.published
    assert result.allocated_size_bytes == 0
    started = pb.ConvertResponse.FromString(call.messages[-2]).started
    assert started.plan.method == pb.METHOD_COPY
    assert started.plan.dest_cache.mode == pb.CACHE_MODE_WRITEBACK
    assert started.plan.available_bytes > 0
    assert os.listdir(images_dir) == []


def test_validation_gets_the_refusal_the_conversion_would_get(
    alice: Agent, source: Path, images_dir: Path
) -> None:
    """Here because the destination exists."""
    dest = images.small(images_dir / "dest.qcow2")
    call = alice.convert(conversion(source, dest, validate_only=True))
    assert call.refusal().reason == "DEST_EXISTS"


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_verified_result_is_compared_with_its_source(
    daemon: Daemon, alice: Agent, library: Path, images_dir: Path, image_format: str
) -> None:
    """And the reply says so. So does a progress event, to who is there to hear it."""
    dest = images_dir / "dest"
    verified = conversion(library / "bulky.raw", dest, dest_format=image_format, verify=True)
    call = alice.convert(verified)
    call.await_event(lambda event: event.progress.phase == pb.PHASE_VERIFYING)
    assert call.result().verified
    assert "run command=qemu-img compare " in daemon.log


def test_rate_limit_slows_a_conversion_down(alice: Agent, source: Path, images_dir: Path) -> None:
    """8 MiB, of which 2 are data, at 1 MiB/s: not in no time."""
    began = time.monotonic()
    request = conversion(source, images_dir / "dest.qcow2", rate_limit_bytes_per_second=MIB)
    alice.convert(request).result()
    assert time.monotonic() - began > 0.9
    assert images.identical(source, images_dir / "dest.qcow2")


# --- overwriting --------------------------------------------------------------------------------


def test_overwrite_of_an_own_file_replaces_it_atomically(
    alice: Agent, source: Path, images_dir: Path
) -> None:
    """By a new inode: whoever has the old one open keeps it whole."""
    dest = images_dir / "dest.qcow2"
    dest.write_bytes(b"old")
    os.chown(dest, ALICE.uid, ALICE.gid)
    with dest.open("rb") as old:
        result = alice.convert(conversion(source, dest, overwrite=True, mode=0o640)).result()
        assert old.read() == b"old"
    assert result.replaced
    assert owner_of(dest) == (ALICE.uid, ALICE.gid, 0o640)
    assert images.identical(source, dest)
    assert os.listdir(images_dir) == ["dest.qcow2"]


def test_overwrite_of_a_missing_file_creates_it(
    alice: Agent, source: Path, images_dir: Path
) -> None:
    """And the reply tells the difference."""
    dest = images_dir / "dest.qcow2"
    result = alice.convert(conversion(source, dest, overwrite=True)).result()
    assert not result.replaced
    assert images.identical(source, dest)


def test_overwrite_of_another_users_file_needs_permission_in_the_policy(
    daemon: Daemon, alice: Agent, source: Path, images_dir: Path
) -> None:
    """`overwrite = "own"` for the one, "any" for the other."""
    dest = images_dir / "dest.qcow2"
    dest.write_bytes(b"root's")
    refusal = alice.convert(conversion(source, dest, overwrite=True)).refusal()
    assert (refusal.status, refusal.reason) == ("FAILED_PRECONDITION", "NOT_YOURS")
    assert refusal.metadata == {"path": str(dest)}
    assert dest.read_bytes() == b"root's"
    bob = daemon.agent(BOB)
    assert bob.convert(conversion(source, dest, overwrite=True)).result().replaced
    assert owner_of(dest) == (BOB.uid, BOB.gid, 0o600)


def test_image_can_be_replaced_through_a_second_hard_link_of_itself(
    daemon: Daemon, source: Path, images_dir: Path
) -> None:
    """A hard link of the source as the destination: the new file takes one of the two names."""
    bob, first, second = daemon.agent(BOB), images_dir / "first", images_dir / "second"
    bob.convert(conversion(source, first, dest_format="raw")).result()
    os.link(first, second)
    request = conversion(first, second, dest_format="qcow2", overwrite=True)
    # The rule lets uid 1235 read the library only: what it may write it may not read.
    assert bob.convert(request).refusal().status == "PERMISSION_DENIED"
    os.chown(second, ALICE.uid, ALICE.gid)
    assert daemon.agent(ALICE).convert(request).result().replaced
    assert images.identical(first, second)
    assert first.stat().st_ino != second.stat().st_ino
