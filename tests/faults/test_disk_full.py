"""Disks that run out, or go away, while an image is written: thin ones, and file systems that stop.

The fault is real: a loop device on a sparse file, on a tmpfs that can't hold it, fails the writes
that it promised to take. The file system above learns of it when it writes back.
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

import loop_devices
import pytest
from harness import images, waiting
from harness.agent import Refusal, conversion
from harness.callers import ALICE
from harness.daemon import QEMU_IMG, Daemon
from harness.mounts import Mounts
from policies import LIBRARY, Grant, Policy, Root

from convertd.v1 import convert_pb2 as pb

DEVICES: Final = Path("/dev/convertd-test-thin")

PLACES: Final = Root("places", "{scratch}", mounts=True)
DEVICES_ROOT: Final = Root("devices", str(DEVICES), kind="block")
POLICY: Final = Policy(grants=[Grant(read=[LIBRARY, PLACES], write=[PLACES, DEVICES_ROOT])])

REAL_MIB: Final = {"ext4": 40, "xfs": 110}
"""An XFS begins with a journal of 64 MiB."""

PROMISED_MIB: Final = 1024
OLD: Final = b"what was there before"

CACHES: Final = {
    "none": pb.CACHE_MODE_AUTO,
    "writeback": pb.CACHE_MODE_WRITEBACK,
    "writethrough": pb.CACHE_MODE_WRITETHROUGH,
    "directsync": pb.CACHE_MODE_DIRECTSYNC,
}
WAYS: Final = list(itertools.product(["ext4", "xfs"], ["raw", "qcow2"], CACHES))

GONE: Final = {"Input/output error", "Read-only file system", "Structure needs cleaning"}
"""What a kernel says of a file system that it has given up."""


@pytest.fixture
def alone(daemon: Daemon, scratch: Path) -> Iterator[Mounts]:
    """File systems of one test's own: it breaks them."""
    with Mounts(scratch) as made:
        yield made
        daemon.await_idle()


@pytest.fixture
def bulky(library: Path) -> Path:
    """A raw image of 64 MiB without a zero in it."""
    return library / "bulky.raw"


def check_failed(refusal: Refusal, dest: Path) -> None:
    """See that the error is one of a full or broken disk, with the path and what it has to say."""
    assert (refusal.status, refusal.reason) in {
        ("RESOURCE_EXHAUSTED", "NO_SPACE"),
        ("DATA_LOSS", "WRITE_FAILED"),
    }
    assert refusal.metadata["path"] == str(dest)
    for value in refusal.metadata.values():
        assert value in refusal.message


# --- thin disks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_thin_disk_that_runs_out_of_space_publishes_nothing(
    daemon: Daemon, alone: Mounts, bulky: Path, way: tuple[str, str, str]
) -> None:
    """The file system has room as far as it knows; the disk below it has not."""
    kind, image_format, cache = way
    pool = alone.in_memory("tmpfs", "pool", f"mode=755,size={REAL_MIB[kind]}m")
    with Mounts(pool) as thin:
        disk = thin.on_a_loop(kind, "disk", PROMISED_MIB)
        dest = disk / "dest"
        request = conversion(bulky, dest, dest_format=image_format, cache_mode=CACHES[cache])
        check_failed(daemon.agent(ALICE).convert(request).refusal(), dest)
        daemon.await_idle()
        assert names_in(disk) == set()


def names_in(directory: Path) -> set[str]:
    """What is in a directory; nothing, if the file system has been given up and does not say."""
    with contextlib.suppress(OSError):
        return set(os.listdir(directory)) - {"lost+found"}
    return set()


@pytest.mark.parametrize("cache", CACHES)
def test_thin_device_out_of_space_is_reported_with_its_content_undefined(
    daemon: Daemon, alone: Mounts, bulky: Path, cache: str
) -> None:
    """With writeback, qemu-img itself says 0: it is our fsync(2) that fails."""
    pool = alone.in_memory("tmpfs", "pool", "mode=755,size=40m")
    with device_on(pool) as device:
        request = conversion(bulky, device, dest_format="raw", cache_mode=CACHES[cache])
        refusal = daemon.agent(ALICE).convert(request).refusal()
        daemon.await_idle()
    assert (refusal.status, refusal.reason) == ("DATA_LOSS", "WRITE_FAILED")
    assert refusal.metadata["path"] == refusal.metadata["device"] == str(device)
    assert refusal.metadata["device_content"] == "undefined"


@contextlib.contextmanager
def device_on(pool: Path) -> Iterator[Path]:
    """A loop device on a sparse file, by the name that a policy's root gives it."""
    with loop_devices.made(pool, DEVICES) as devices:
        device = devices.add("disk", PROMISED_MIB * images.MIB, dirty=False)
        yield device
    waiting.until(lambda: str(pool) not in losetup(), "its loop device is free")


def losetup() -> str:
    """The loop devices in use, and what they are on. Numbers are used again by others."""
    return subprocess.run(["losetup"], check=True, capture_output=True, text=True).stdout


# --- file systems that stop ---------------------------------------------------------------------


def made_read_only(point: Path) -> None:
    """What ext4 does when it finds an error and was told errors=remount-ro."""
    subprocess.run(["mount", "-o", "remount,abort", str(point)], check=True)


def shut_down(point: Path) -> None:
    """What a file system does when it can't write its journal."""
    subprocess.run(["xfs_io", "-x", "-c", "shutdown", str(point)], check=True)


STOPS: Final = {
    "ext4 made read-only": ("ext4", made_read_only),
    "ext4 shut down": ("ext4", shut_down),
    "xfs shut down": ("xfs", shut_down),
}


@pytest.mark.parametrize("cache", ["none", "writeback"])
@pytest.mark.parametrize("name", STOPS)
def test_file_system_shut_down_during_a_write_keeps_the_old_file(
    daemon: Daemon, scratch: Path, bulky: Path, name: str, cache: str
) -> None:
    """Mounted again it has the old file, and nothing else."""
    kind, stop = STOPS[name]
    with Mounts(scratch) as alone:
        disk = alone.on_a_loop(kind, "disk", 96)
        dest = disk / "dest"
        dest.write_bytes(OLD)
        os.chown(dest, ALICE.uid, ALICE.gid)
        subprocess.run(["sync", "-f", str(dest)], check=True)
        call = daemon.agent(ALICE).convert(
            conversion(
                bulky,
                dest,
                dest_format="raw",
                overwrite=True,
                cache_mode=CACHES[cache],
                rate_limit_bytes_per_second=8 * images.MIB,
            )
        )
        call.await_event(lambda event: event.progress.percent > 0)
        daemon.await_one(QEMU_IMG)
        stop(disk)
        refusal = call.refusal()
        daemon.await_idle()
        check_failed(refusal, dest)
        assert refusal.metadata["problem"] in GONE
        subprocess.run(["umount", str(disk)], check=True)
        # A copy: another mount namespace may hold the file system as it is, which has stopped.
        image = scratch / f".again.{kind}"
        shutil.copyfile(scratch / f".disk.{kind}", image)
        options = "loop,nouuid" if kind == "xfs" else "loop"
        subprocess.run(["mount", "-o", options, str(image), str(disk)], check=True)
        image.unlink()
        assert names_in(disk) == {"dest"}
        assert dest.read_bytes() == OLD
