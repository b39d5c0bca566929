"""A disk that fails a system call: the call fails with the right condition, and nothing is there.

strace makes the kernel answer one call with an error, in the job or in its qemu-img, wherever that
call comes in the pipeline; everything else is real. Calls of the job that also other processes make
are told apart by the path that they are about.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import loop_devices
import pytest
from harness import images
from harness.agent import Agent, Refusal, conversion
from harness.callers import ALICE, owner_of
from harness.daemon import JOB, QEMU_IMG, Daemon
from harness.tracing import Tracer
from policies import IMAGES, LIBRARY, Grant, Policy, Root

from convertd.v1 import convert_pb2 as pb

DEVICES: Final = Path("/dev/convertd-test-injected")

DEVICES_ROOT: Final = Root("devices", str(DEVICES), kind="block")
POLICY: Final = Policy(grants=[Grant(read=[LIBRARY, IMAGES], write=[IMAGES, DEVICES_ROOT])])

DEVICE_MIB: Final = 12
OLD: Final = b"what was there before"

NO_SPACE: Final = ("RESOURCE_EXHAUSTED", "NO_SPACE")
QUOTA: Final = ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
WRITE_FAILED: Final = ("DATA_LOSS", "WRITE_FAILED")
READ_FAILED: Final = ("DATA_LOSS", "READ_FAILED")
NOT_DURABLE: Final = ("DATA_LOSS", "PUBLISHED_BUT_NOT_DURABLE")
READ_ONLY: Final = ("FAILED_PRECONDITION", "READ_ONLY_FILE_SYSTEM")

PROBLEMS: Final = {"EIO": "Input/output error", "ENOSPC": "No space left on device"}
FLUSHES: Final = "fdatasync,fsync"
"""A disk that fails to flush fails both. Of a raw file qemu-img takes no notice, and says 0."""

CACHES: Final = {
    "none": pb.CACHE_MODE_AUTO,
    "writeback": pb.CACHE_MODE_WRITEBACK,
    "writethrough": pb.CACHE_MODE_WRITETHROUGH,
    "directsync": pb.CACHE_MODE_DIRECTSYNC,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """System calls that fail, how, and with what the call is to end. `about` is a path, or all."""

    calls: str
    error: str
    ends: tuple[str, str]
    about: Path | None = None
    when: str = "1+"

    @property
    def inject(self) -> str:
        """As strace wants it."""
        fault = f"{self.calls}:error={self.error}:when={self.when}"
        # Where the kernel tells what a file system takes, nothing is tried, nor taken back. The
        # first statx(2) is of the source's size and time.
        return f"statx:error=ENOSYS:when=2+ {fault}" if self.calls == "ftruncate" else fault


@pytest.fixture
def alice(daemon: Daemon) -> Agent:
    """Calls as uid 1234."""
    return daemon.agent(ALICE)


@pytest.fixture
def source(library: Path) -> Path:
    """A raw image of 8 MiB, 2 of them data."""
    return library / "small.raw"


def refused(daemon: Daemon, fault: Fault, request: pb.ConvertRequest) -> Refusal:
    """Ask while a fault is in force. It must have come, and the daemon must serve afterwards."""
    with Tracer(daemon.traced(), fault.inject, fault.about) as tracer:
        refusal = daemon.agent(ALICE).convert(request).refusal()
        daemon.await_idle()
    assert tracer.injected, tracer.text
    assert (refusal.status, refusal.reason) == fault.ends
    for value in refusal.metadata.values():
        assert value in refusal.message
    return refusal


def check_reported(refusal: Refusal, path: Path, error: str) -> None:
    """See that the error has the path, and the numbers or the kernel's words."""
    assert refusal.metadata["path"] == str(path)
    if refusal.reason == "NO_SPACE":
        assert Path(refusal.metadata["mount_point"]).is_mount()
        assert int(refusal.metadata["needed_bytes"]) > 0
        assert int(refusal.metadata["free_bytes"]) > 0
    elif refusal.status == "DATA_LOSS":
        assert refusal.metadata["problem"] == PROBLEMS[error]


# --- the job ------------------------------------------------------------------------------------

IN_THE_JOB: Final = {
    "open of the unnamed file, full": ("openat", "ENOSPC", NO_SPACE, True, "1+"),
    "open of the unnamed file, quota": ("openat", "EDQUOT", QUOTA, True, "1+"),
    "open of the unnamed file, broken": ("openat", "EIO", WRITE_FAILED, True, "1+"),
    "open of the unnamed file, read-only": ("openat", "EROFS", READ_ONLY, True, "1+"),
    "fchown": ("fchown", "EIO", WRITE_FAILED, False, "1"),
    "fchmod, of the new file": ("fchmod", "EIO", WRITE_FAILED, False, "1"),
    "fchmod, of the finished file": ("fchmod", "EIO", WRITE_FAILED, False, "2"),
    "fsync, broken": ("fsync", "EIO", WRITE_FAILED, False, "1"),
    "fsync, full": ("fsync", "ENOSPC", NO_SPACE, False, "1"),
    "fsync, quota": ("fsync", "EDQUOT", QUOTA, False, "1"),
    "ftruncate, broken": ("ftruncate", "EIO", WRITE_FAILED, False, "1+"),
    "ftruncate, full": ("ftruncate", "ENOSPC", NO_SPACE, False, "1+"),
    "linkat, broken": ("linkat", "EIO", WRITE_FAILED, False, "1+"),
    "linkat, full": ("linkat", "ENOSPC", NO_SPACE, False, "1+"),
    "linkat, quota": ("linkat", "EDQUOT", QUOTA, False, "1+"),
}
"""System call, error, how the call is to end, whether only about the directory, and which of the
calls of one process."""


@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwrite"])
@pytest.mark.parametrize("name", IN_THE_JOB)
def test_failing_system_call_of_the_job_publishes_nothing_at(
    daemon: Daemon, source: Path, images_dir: Path, name: str, *, overwrite: bool
) -> None:
    """And what was there before is there still."""
    calls, error, ends, in_directory, when = IN_THE_JOB[name]
    about = images_dir if in_directory else None
    fault = Fault(calls=calls, error=error, ends=ends, about=about, when=when)
    dest = images_dir / "dest.qcow2"
    if overwrite:
        old_file(dest)
    refusal = refused(daemon, fault, conversion(source, dest, overwrite=overwrite))
    check_reported(refusal, dest, error)
    check_untouched(dest, overwrite=overwrite)


@pytest.mark.parametrize("step", ["linkat", "rename"])
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_failing_overwrite_step_keeps_the_old_file_and_no_temporary(
    daemon: Daemon, source: Path, images_dir: Path, step: str, error: str
) -> None:
    """The temporary's name at the second linkat(2), or the renameat2(2)."""
    fault = Fault(
        calls={"linkat": "linkat", "rename": "/^rename"}[step],
        error=error,
        ends=NO_SPACE if error == "ENOSPC" else WRITE_FAILED,
        when="2" if step == "linkat" else "1",
    )
    dest = old_file(images_dir / "dest.qcow2")
    refusal = refused(daemon, fault, conversion(source, dest, overwrite=True))
    check_reported(refusal, dest, error)
    check_untouched(dest, overwrite=True)


@pytest.mark.parametrize("error", ["EINVAL", "ENOSYS", "EOPNOTSUPP"])
def test_file_system_without_rename_exchange_is_overwritten_by_rename(
    daemon: Daemon, source: Path, images_dir: Path, error: str
) -> None:
    """Where nobody else may write the directory; elsewhere it is refused."""
    dest = old_file(images_dir / "dest.qcow2")
    request = conversion(source, dest, overwrite=True)
    with Tracer(daemon.traced(), f"renameat2:error={error}") as tracer:
        assert daemon.agent(ALICE).convert(request).result().replaced
        images_dir.chmod(0o1777)
        refusal = daemon.agent(ALICE).convert(request).refusal()
        daemon.await_idle()
    assert tracer.injected, tracer.text
    assert (refusal.status, refusal.reason) == ("UNIMPLEMENTED", "UNSUPPORTED")
    assert os.listdir(images_dir) == [dest.name]
    assert images.identical(source, dest)


@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwrite"])
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_failed_fsync_of_the_directory_is_reported_with_the_result_in_place(
    daemon: Daemon, source: Path, images_dir: Path, error: str, *, overwrite: bool
) -> None:
    """The one error after which the result is in place: it is whole, and has its owner."""
    fault = Fault(calls="fsync", error=error, ends=NOT_DURABLE, about=images_dir)
    dest = images_dir / "dest.qcow2"
    if overwrite:
        old_file(dest)
    refusal = refused(daemon, fault, conversion(source, dest, overwrite=overwrite))
    check_reported(refusal, dest, error)
    assert os.listdir(images_dir) == [dest.name]
    assert images.identical(source, dest)
    assert owner_of(dest) == (ALICE.uid, ALICE.gid, 0o600)


def test_source_that_can_not_be_opened_is_reported_with_its_path(
    daemon: Daemon, source: Path, images_dir: Path
) -> None:
    """With its own path, not the destination's."""
    dest = images_dir / "dest.qcow2"
    fault = Fault(calls="openat2", error="EIO", ends=READ_FAILED, about=source.parent)
    check_reported(refused(daemon, fault, conversion(source, dest)), source, "EIO")
    check_untouched(dest, overwrite=False)


# --- qemu-img -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", list(itertools.product(["raw", "qcow2"], CACHES)), ids="-".join)
@pytest.mark.parametrize(
    "failing",
    list(itertools.product(["pwrite64", FLUSHES], PROBLEMS)),
    ids="-".join,
)
def test_failing_system_call_of_qemu_img_publishes_nothing_at(
    daemon: Daemon,
    source: Path,
    images_dir: Path,
    failing: tuple[str, str],
    way: tuple[str, str],
) -> None:
    """What is first written of qcow2 is its header, and of all the rest the image's data."""
    (call, error), (image_format, cache) = failing, way
    ends = NO_SPACE if error == "ENOSPC" else WRITE_FAILED
    fault = Fault(calls=call, error=error, ends=ends)
    dest = old_file(images_dir / f"dest.{image_format}")
    request = conversion(
        source, dest, dest_format=image_format, overwrite=True, cache_mode=CACHES[cache]
    )
    check_reported(refused(daemon, fault, request), dest, error)
    check_untouched(dest, overwrite=True)


@pytest.mark.parametrize("cache", CACHES)
def test_failed_space_reservation_is_reported(
    daemon: Daemon, source: Path, images_dir: Path, cache: str
) -> None:
    """fallocate(2), for preallocation."""
    dest = images_dir / "dest.raw"
    fault = Fault(calls="fallocate", error="ENOSPC", ends=NO_SPACE)
    request = conversion(
        source,
        dest,
        dest_format="raw",
        preallocation=pb.PREALLOCATION_FALLOC,
        cache_mode=CACHES[cache],
    )
    check_reported(refused(daemon, fault, request), dest, "ENOSPC")
    check_untouched(dest, overwrite=False)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_source_read_error_is_reported_with_its_path(
    daemon: Daemon, source: Path, images_dir: Path, image_format: str
) -> None:
    """With its own path, and the kernel's words."""
    dest = images_dir / f"dest.{image_format}"
    fault = Fault(calls="pread64,preadv", error="EIO", ends=READ_FAILED, about=source)
    request = conversion(source, dest, dest_format=image_format, cache_mode=pb.CACHE_MODE_WRITEBACK)
    check_reported(refused(daemon, fault, request), source, "EIO")
    check_untouched(dest, overwrite=False)


def test_destination_open_error_of_qemu_img_is_reported(
    daemon: Daemon, alice: Agent, source: Path, images_dir: Path
) -> None:
    """Of all that is said of opening, only the kernel's words go any further."""
    # With a cache mode, for a job copies what is small without qemu-img.
    first = conversion(source, images_dir / "first.qcow2", cache_mode=pb.CACHE_MODE_WRITEBACK)
    alice.convert(first).result()
    opened = re.findall(r" (/proc/self/fd/\d+)$", daemon.log, re.MULTILINE)[-1]
    fault = Fault(calls="openat", error="EIO", ends=WRITE_FAILED, about=Path(opened))
    dest = images_dir / "dest.qcow2"
    request = conversion(source, dest, cache_mode=pb.CACHE_MODE_WRITEBACK)
    check_reported(refused(daemon, fault, request), dest, "EIO")
    assert os.listdir(images_dir) == ["first.qcow2"]


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize(
    "failing",
    [
        ("pread64", "EIO", READ_FAILED),
        ("pwrite64", "EIO", WRITE_FAILED),
        ("pwrite64", "ENOSPC", NO_SPACE),
        ("pwrite64", "EDQUOT", QUOTA),
    ],
    ids=["read", "write", "full", "quota"],
)
def test_error_of_a_job_that_copies_a_small_image_is_reported(
    daemon: Daemon,
    source: Path,
    images_dir: Path,
    failing: tuple[str, str, tuple[str, str]],
    image_format: str,
) -> None:
    """No program runs, so what fails is the job's own call."""
    calls, error, ends = failing
    dest = images_dir / f"dest.{image_format}"
    about = source if calls == "pread64" else None
    fault = Fault(calls=calls, error=error, ends=ends, about=about)
    refusal = refused(daemon, fault, conversion(source, dest, dest_format=image_format))
    check_reported(refusal, about or dest, error)
    check_untouched(dest, overwrite=False)


# --- a device -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def device(scratch: Path, daemon: Daemon) -> Iterator[Path]:
    """A loop device, by the name that a policy's root gives it, as a volume manager would."""
    assert daemon.is_running
    with loop_devices.made(scratch, DEVICES) as devices:
        yield devices.add("disk", DEVICE_MIB * images.MIB, dirty=False)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    "failing",
    list(itertools.product(["pwrite64", FLUSHES, "fsync"], PROBLEMS)),
    ids="-".join,
)
def test_device_write_error_is_reported_with_its_content_undefined(
    daemon: Daemon, source: Path, device: Path, failing: tuple[str, str], cache: str
) -> None:
    """There is no temporary for a device: what it holds is undefined, and the error says so."""
    call, error = failing
    fault = Fault(calls=call, error=error, ends=WRITE_FAILED, about=device.resolve())
    request = conversion(source, device, dest_format="raw", cache_mode=CACHES[cache])
    refusal = refused(daemon, fault, request)
    check_reported(refusal, device, error)
    assert refusal.metadata["device"] == str(device)
    assert refusal.metadata["device_content"] == "undefined"


def test_failed_zeroing_of_the_rest_of_a_device_is_reported(
    daemon: Daemon, alice: Agent, source: Path, device: Path
) -> None:
    """BLKZEROOUT, of what lies beyond the image: the job's first ioctl(2) after qemu-img."""
    call = alice.convert(
        conversion(source, device, dest_format="raw", rate_limit_bytes_per_second=images.MIB)
    )
    daemon.await_one(QEMU_IMG)
    with Tracer([daemon.await_one(JOB)], "ioctl:error=EIO", follow=False) as tracer:
        refusal = call.refusal()
        daemon.await_idle()
    assert tracer.injected
    assert (refusal.status, refusal.reason) == WRITE_FAILED
    assert refusal.metadata["device_content"] == "undefined"


def test_device_is_writable_after_earlier_failures(
    alice: Agent, source: Path, device: Path
) -> None:
    """No descriptor, lock or process of a failed job stands in the way."""
    alice.convert(conversion(source, device, dest_format="raw")).result()
    assert device.read_bytes()[: images.SMALL_MIB * images.MIB] == source.read_bytes()


# --- before and after ---------------------------------------------------------------------------


def old_file(path: Path) -> Path:
    """A file of the caller's that is to be overwritten."""
    path.write_bytes(OLD)
    os.chown(path, ALICE.uid, ALICE.gid)
    return path


def check_untouched(dest: Path, *, overwrite: bool) -> None:
    """See that nothing is in the directory but what was."""
    assert os.listdir(dest.parent) == ([dest.name] if overwrite else [])
    assert not overwrite or dest.read_bytes() == OLD
