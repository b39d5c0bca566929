"""Where images lie: cache modes, file systems without O_TMPFILE, and full ones."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from harness import images, waiting
from harness.agent import Agent, Call, conversion
from harness.callers import ALICE, BOB, owner_of
from harness.daemon import QEMU_IMG, Daemon
from harness.mounts import Mounts
from harness.tracing import Tracer
from policies import LIBRARY, Grant, Policy, Root

from convertd.v1 import convert_pb2 as pb

PLACES: Final = Root("places", "{scratch}", mounts=True)
OWNERLESS: Final = Root("ownerless", "{scratch}/ownerless", mounts=True, allow_ownerless=True)
POLICY: Final = Policy(grants=[Grant(read=[LIBRARY, PLACES], write=[PLACES, OWNERLESS])])

MIB: Final = 1024 * 1024

ROOMY_MIB: Final = 64
TIGHT_MIB: Final = 4


@pytest.fixture(scope="module")
def alice(mounts: Mounts, daemon: Daemon) -> Agent:
    """Calls as uid 1234. The mounts come first: they are taken away when the daemon is gone."""
    assert mounts is not None
    return daemon.agent(ALICE)


@pytest.fixture
def source(library: Path) -> Path:
    """A raw image of 8 MiB, 2 of them data."""
    return library / "small.raw"


@pytest.fixture(scope="module", params=["ext4", "xfs", "btrfs"])
def on_disk(mounts: Mounts, request: pytest.FixtureRequest) -> Path:
    """A file system on a loop device."""
    return mounts.on_a_loop(request.param, request.param, ROOMY_MIB)


@pytest.fixture(scope="module")
def ramfs(mounts: Mounts) -> Path:
    """A file system that refuses direct I/O, as tmpfs did before Linux 6.6."""
    return mounts.in_memory("ramfs", "ramfs")


@pytest.fixture(scope="module")
def tight(mounts: Mounts) -> Path:
    """A tmpfs of 4 MiB."""
    return mounts.in_memory("tmpfs", "tight", f"mode=755,size={TIGHT_MIB}m")


@pytest.fixture(scope="module")
def by_fuse(mounts: Mounts, scratch: Path) -> Path:
    """A FUSE file system, whose real directory is `beneath`."""
    beneath = scratch / "beneath"
    beneath.mkdir()
    return mounts.by_fuse(beneath, "by-fuse")


@contextlib.contextmanager
def cleared(directory: Path) -> Iterator[None]:
    """See that a test leaves nothing but what it made by name, and take that away."""
    yield
    for path in directory.iterdir():
        assert not path.name.startswith(".convertd"), path
        if path.is_file():
            path.unlink()


# --- cache modes --------------------------------------------------------------------------------


def by_qemu_img(source: Path, dest: Path) -> pb.ConvertRequest:
    """A request with a rate: without one, a job copies what is small through the page cache."""
    return conversion(source, dest, rate_limit_bytes_per_second=1024 * MIB)


def test_file_system_with_direct_io_gets_cache_mode_none_on(
    alice: Agent, source: Path, on_disk: Path
) -> None:
    """Both ways, for source and destination; and the reply says why."""
    there, back = on_disk / "there.qcow2", on_disk / "back.raw"
    with cleared(on_disk):
        result = alice.convert(by_qemu_img(source, there)).result()
        assert result.dest_cache.mode == pb.CACHE_MODE_NONE
        assert result.dest_cache.reason == "the destination takes direct writes"
        request = conversion(there, back, source_format="qcow2", dest_format="raw")
        result = alice.convert(request).result()
        assert result.source_cache.mode == result.dest_cache.mode == pb.CACHE_MODE_NONE
        assert images.identical(source, back)
        assert owner_of(back) == (ALICE.uid, ALICE.gid, 0o600)


def test_file_system_without_direct_io_gets_cache_mode_writeback(
    alice: Agent, source: Path, ramfs: Path
) -> None:
    """Found out by trying; and the reply has the kernel's word for it."""
    there, back = ramfs / "there.qcow2", ramfs / "back.raw"
    with cleared(ramfs):
        result = alice.convert(by_qemu_img(source, there)).result()
        assert result.dest_cache.mode == pb.CACHE_MODE_WRITEBACK
        reason = "the destination takes no direct writes: Invalid argument"
        assert result.dest_cache.reason == reason
        request = conversion(there, back, source_format="qcow2", dest_format="raw")
        result = alice.convert(request).result()
        assert result.source_cache.mode == pb.CACHE_MODE_WRITEBACK
        assert "Invalid argument" in result.source_cache.reason
        assert images.identical(source, back)


@pytest.mark.parametrize("mode", ["writeback", "writethrough", "directsync", "none"])
def test_requested_cache_mode_is_used(
    alice: Agent, source: Path, images_dir: Path, mode: str
) -> None:
    """The reply says that it was asked for."""
    number = pb.CacheMode.Value(f"CACHE_MODE_{mode.upper()}")
    request = conversion(source, images_dir / "dest.qcow2", cache_mode=number)
    choice = alice.convert(request).result().dest_cache
    assert (choice.mode, choice.reason) == (number, "asked for")
    assert images.identical(source, images_dir / "dest.qcow2")


@pytest.mark.parametrize("mode", [pb.CACHE_MODE_NONE, pb.CACHE_MODE_DIRECTSYNC])
def test_requested_direct_io_is_refused_where_the_file_system_has_none(
    alice: Agent, source: Path, ramfs: Path, mode: pb.CacheMode
) -> None:
    """And nothing is done in another way than the one that was asked for."""
    call = alice.convert(conversion(source, ramfs / "dest.qcow2", cache_mode=mode))
    refusal = call.refusal()
    assert (refusal.status, refusal.reason) == ("FAILED_PRECONDITION", "NO_DIRECT_WRITES")
    assert os.listdir(ramfs) == []


# --- named temporaries --------------------------------------------------------------------------


def test_result_is_published_on_a_file_system_without_o_tmpfile(
    alice: Agent, source: Path, by_fuse: Path
) -> None:
    """FUSE has no O_TMPFILE. The temporary's name is gone when the call returns."""
    with cleared(by_fuse):
        alice.convert(conversion(source, by_fuse / "dest.qcow2")).result()
        waiting.until(lambda: os.listdir(by_fuse) == ["dest.qcow2"], "the result alone")
        assert owner_of(by_fuse / "dest.qcow2") == (ALICE.uid, ALICE.gid, 0o600)
        assert images.identical(source, by_fuse / "dest.qcow2")


def test_result_overwrites_atomically_on_a_file_system_without_o_tmpfile(
    alice: Agent, source: Path, by_fuse: Path
) -> None:
    """By rename(2) of the temporary."""
    dest = by_fuse / "dest.qcow2"
    with cleared(by_fuse):
        dest.write_bytes(b"old")
        os.chown(dest, ALICE.uid, ALICE.gid)
        assert alice.convert(conversion(source, dest, overwrite=True)).result().replaced
        waiting.until(lambda: os.listdir(by_fuse) == ["dest.qcow2"], "the result alone")
        assert images.identical(source, dest)


def test_failed_job_leaves_no_temporary_on_a_file_system_without_o_tmpfile(
    alice: Agent, images_dir: Path, by_fuse: Path
) -> None:
    """An image that does not decompress, so that qemu-img notices it in the middle."""
    source = images_dir / "source.qcow2"
    images.converted(Path("/usr/bin/qemu-img"), source, "qcow2", "-c")
    with source.open("r+b") as file:
        file.seek(source.stat().st_size // 2)
        file.write(b"\xff" * 65536)
    request = conversion(source, by_fuse / "dest.raw", source_format="qcow2", dest_format="raw")
    refusal = alice.convert(request).refusal()
    assert (refusal.status, refusal.reason) == ("DATA_LOSS", "READ_FAILED")
    assert refusal.metadata == {"path": str(source), "problem": "Input/output error"}
    # libfuse hides what is removed while it is open, until it hears of the last close.
    waiting.until(lambda: os.listdir(by_fuse) == [], "no file")


def slow(source: Path, dest: Path) -> pb.ConvertRequest:
    """A conversion that takes a minute."""
    return conversion(source, dest, rate_limit_bytes_per_second=MIB)


def test_stale_temporaries_are_removed_and_locked_ones_are_kept(
    daemon: Daemon, alice: Agent, library: Path, source: Path, by_fuse: Path
) -> None:
    """Whoever makes one removes those that nobody locks; a job locks its own."""
    stale, foreign = by_fuse / ".convertd-0123456789abcdef.tmp", by_fuse / ".convertd-notes"
    with cleared_but(by_fuse, foreign):
        stale.write_bytes(b"of a job that was killed")
        os.chown(stale, ALICE.uid, ALICE.gid)
        call = alice.convert(slow(library / "bulky.raw", by_fuse / "slow.qcow2"))
        call.await_started()
        daemon.await_one(QEMU_IMG)
        assert not stale.exists()
        (live,) = temporaries(by_fuse)
        alice.convert(conversion(source, by_fuse / "dest.qcow2")).result()
        assert temporaries(by_fuse) == [live]
        assert visible(by_fuse) == ["dest.qcow2"]
        end(call, daemon)
        assert temporaries(by_fuse) == []


def test_file_system_without_exclusive_link_or_rename_gets_no_result(
    daemon: Daemon, source: Path, by_fuse: Path
) -> None:
    """A file system without hard links, and without RENAME_NOREPLACE: exFAT by FUSE is one."""
    refused = "renameat2:error=EINVAL linkat:error=EPERM"
    request = conversion(source, by_fuse / "dest.raw", dest_format="raw")
    with Tracer(daemon.traced(), refused) as tracer:
        refusal = daemon.agent(ALICE).convert(request).refusal()
        daemon.await_idle()
    assert tracer.injected == 2, tracer.text
    assert (refusal.status, refusal.reason) == ("UNIMPLEMENTED", "UNSUPPORTED")
    waiting.until(lambda: os.listdir(by_fuse) == [], "no file")


def test_temporary_locked_by_another_process_is_kept(
    alice: Agent, source: Path, by_fuse: Path
) -> None:
    """The lock is what tells, not the age."""
    held = by_fuse / ".convertd-fedcba9876543210.tmp"
    with held.open("wb") as file:
        os.chown(held, ALICE.uid, ALICE.gid)
        fcntl.flock(file, fcntl.LOCK_EX)
        alice.convert(conversion(source, by_fuse / "one.qcow2")).result()
        assert held.exists()
    alice.convert(conversion(source, by_fuse / "two.qcow2")).result()
    assert not held.exists()
    with cleared(by_fuse):
        assert visible(by_fuse) == ["one.qcow2", "two.qcow2"]


def test_files_with_temporary_like_names_are_kept(
    alice: Agent, source: Path, by_fuse: Path, images_dir: Path
) -> None:
    """Whosever they are, but the caller's; and of the caller's what is called otherwise."""
    for directory in (by_fuse, images_dir):
        dest = directory / "dest.raw"
        names = {".convertd-0123456789abcdef.tmp": 0, ".convertd-fedcba9876543210.tmp": BOB.uid}
        names |= {".convertd-notes.tmp": ALICE.uid, ".convertd-0123.tmp": ALICE.uid}
        for name, uid in names.items():
            (directory / name).write_bytes(b"precious")
            os.chown(directory / name, uid, uid)
        alice.convert(conversion(source, dest, dest_format="raw")).result()
        alice.convert(conversion(source, dest, dest_format="raw", overwrite=True)).result()
        for name in names:
            assert (directory / name).read_bytes() == b"precious"
            (directory / name).unlink()
        dest.unlink()


def temporaries(directory: Path) -> list[str]:
    """Names that convertd keeps for itself."""
    return [name for name in os.listdir(directory) if name.endswith(".tmp")]


def visible(directory: Path) -> list[str]:
    """The other names."""
    return sorted(name for name in os.listdir(directory) if not name.startswith("."))


@contextlib.contextmanager
def cleared_but(directory: Path, kept: Path) -> Iterator[None]:
    """As `cleared`, with a file that is not convertd's to remove though its name looks like it."""
    kept.write_bytes(b"no temporary")
    yield
    kept.unlink()
    with cleared(directory):
        pass


def end(call: Call, daemon: Daemon) -> None:
    """Cancel a conversion, and wait until its processes are gone."""
    call.cancel()
    assert call.end().status == "CANCELLED"
    daemon.await_idle()


# --- space --------------------------------------------------------------------------------------


def test_file_system_that_is_too_small_is_refused_before_anything_is_written(
    alice: Agent, library: Path, tight: Path
) -> None:
    """With the bytes that are needed, those that are free, and where."""
    source, dest = library / "bulky.raw", tight / "dest.qcow2"
    refusal = alice.convert(conversion(source, dest)).refusal()
    assert (refusal.status, refusal.reason) == ("RESOURCE_EXHAUSTED", "NO_SPACE")
    assert refusal.metadata["mount_point"] == str(tight)
    assert refusal.metadata["path"] == str(dest)
    # What it takes on the disk may be a block more, for the file system's own use.
    assert int(refusal.metadata["needed_bytes"]) == source.stat().st_size
    assert int(refusal.metadata["free_bytes"]) == TIGHT_MIB * MIB
    for value in refusal.metadata.values():
        assert value in refusal.message
    assert os.listdir(tight) == []


@pytest.mark.parametrize("mode", [pb.PREALLOCATION_FALLOC, pb.PREALLOCATION_FULL])
def test_preallocation_requires_space_for_the_whole_virtual_size(
    alice: Agent, source: Path, tight: Path, mode: pb.Preallocation
) -> None:
    """Although only a quarter of the image is data."""
    request = conversion(source, tight / "dest.raw", dest_format="raw", preallocation=mode)
    refusal = alice.convert(request).refusal()
    assert refusal.reason == "NO_SPACE"
    assert refusal.metadata["needed_bytes"] == str(images.SMALL_MIB * MIB)


def test_sparse_image_fits_where_its_data_fits(alice: Agent, source: Path, tight: Path) -> None:
    """8 MiB of disk, 2 of data, on 4 MiB."""
    with cleared(tight):
        alice.convert(conversion(source, tight / "dest.raw", dest_format="raw")).result()
        assert images.identical(source, tight / "dest.raw")


def test_file_system_that_fills_up_during_a_write_gets_no_result(
    alice: Agent, library: Path, tight: Path
) -> None:
    """How much a compressed image takes is not known beforehand. This one can't be compressed."""
    request = conversion(
        library / "bulky.raw", tight / "dest.qcow2", compression=pb.COMPRESSION_ZLIB
    )
    refusal = alice.convert(request).refusal()
    assert (refusal.status, refusal.reason) == ("RESOURCE_EXHAUSTED", "NO_SPACE")
    assert refusal.metadata["mount_point"] == str(tight)
    assert os.listdir(tight) == []
    waiting.until(lambda: free_bytes(tight) == TIGHT_MIB * MIB, "the space is free again")


def test_overwritten_file_survives_a_file_system_that_fills_up(
    alice: Agent, library: Path, tight: Path
) -> None:
    """The old one stays whole until the new one is."""
    dest = tight / "dest.qcow2"
    dest.write_bytes(b"old")
    os.chown(dest, ALICE.uid, ALICE.gid)
    request = conversion(
        library / "bulky.raw", dest, compression=pb.COMPRESSION_ZLIB, overwrite=True
    )
    with cleared(tight):
        assert alice.convert(request).refusal().reason == "NO_SPACE"
        assert os.listdir(tight) == ["dest.qcow2"]
        assert dest.read_bytes() == b"old"


def test_loop_device_that_fills_up_during_fsync_gets_no_result(
    alice: Agent, library: Path, mounts: Mounts
) -> None:
    """Delayed allocation: on ext4 the error may come as late as fsync(2)."""
    small = mounts.on_a_loop("ext4", "small", 16)
    request = conversion(
        library / "bulky.raw",
        small / "dest.qcow2",
        compression=pb.COMPRESSION_ZSTD,
        cache_mode=pb.CACHE_MODE_WRITEBACK,
    )
    assert alice.convert(request).refusal().reason == "NO_SPACE"
    assert os.listdir(small) == ["lost+found"]


def free_bytes(path: Path) -> int:
    """What may still be written there."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


# --- read-only ----------------------------------------------------------------------------------


def test_read_only_destination_file_system_is_reported_as_such(
    alice: Agent, source: Path, mounts: Mounts, images_dir: Path
) -> None:
    """Which is another thing than a full one."""
    frozen = mounts.bound(images_dir, "frozen", read_only=True)
    refusal = alice.convert(conversion(source, frozen / "dest.qcow2")).refusal()
    assert (refusal.status, refusal.reason) == ("FAILED_PRECONDITION", "READ_ONLY_FILE_SYSTEM")
    assert refusal.violations == (("READ_ONLY_FILE_SYSTEM", str(frozen / "dest.qcow2")),)


def test_source_on_a_read_only_file_system_is_converted(
    alice: Agent, mounts: Mounts, images_dir: Path
) -> None:
    """Nothing is written to a source, not even a lock."""
    beneath = images_dir / "beneath"
    beneath.mkdir()
    source = images.small(beneath / "source.raw")
    frozen = mounts.bound(beneath, "frozen-source", read_only=True)
    request = conversion(frozen / "source.raw", images_dir / "dest.qcow2")
    alice.convert(request).result()
    assert images.identical(source, images_dir / "dest.qcow2")


def test_directory_without_free_inodes_is_reported_as_full(
    alice: Agent, source: Path, mounts: Mounts
) -> None:
    """ENOSPC, at open(2) already."""
    spent = mounts.in_memory("tmpfs", "spent", "mode=755,size=64m,nr_inodes=2")
    subprocess.run(["touch", str(spent / "last")], check=True)
    refusal = alice.convert(conversion(source, spent / "dest.qcow2")).refusal()
    assert (refusal.status, refusal.reason) == ("RESOURCE_EXHAUSTED", "NO_SPACE")
    assert refusal.metadata["mount_point"] == str(spent)


# --- owners -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ntfs(mounts: Mounts) -> Path:
    """An NTFS by ntfs-3g: every file is root's, with mode 0777, whatever is asked for."""
    return mounts.ntfs("ntfs")


@pytest.fixture(scope="module")
def ownerless(mounts: Mounts) -> Path:
    """The same, where the policy allows that."""
    return mounts.ntfs("ownerless/ntfs")


def test_file_system_that_ignores_chown_is_refused_before_the_conversion(
    alice: Agent, source: Path, ntfs: Path
) -> None:
    """Fchown(2) and fchmod(2) say 0 there; what they did is looked at."""
    dest = ntfs / "dest.raw"
    refusal = alice.convert(conversion(source, dest, dest_format="raw")).refusal()
    assert (refusal.status, refusal.reason) == ("FAILED_PRECONDITION", "OWNER_NOT_KEPT")
    assert refusal.metadata == {
        "path": str(dest),
        "found": "uid 0, gid 0, mode 0777",
        "wanted": "uid 1234, gid 1234, mode 0600",
    }
    waiting.until(lambda: os.listdir(ntfs) == [], "no file")
    request = conversion(source, dest, dest_format="raw", validate_only=True)
    assert alice.convert(request).refusal().reason == "OWNER_NOT_KEPT"


def test_result_on_a_file_system_that_ignores_chown_has_a_warning_if_allowed(
    alice: Agent, source: Path, ownerless: Path
) -> None:
    """Fresh and overwriting: with a warning, and whole."""
    dest = ownerless / "dest.raw"
    request = conversion(source, dest, dest_format="raw", validate_only=True)
    (expected,) = alice.convert(request).result().warnings
    assert expected.reason == "OWNER_NOT_KEPT"
    result = alice.convert(conversion(source, dest, dest_format="raw")).result()
    (warning,) = result.warnings
    assert warning.reason == "OWNER_NOT_KEPT"
    assert "uid 0, gid 0, mode 0777, not uid 1234, gid 1234, mode 0600" in warning.message
    assert images.identical(source, dest)
    # Who owns it is root now; so the policy's "own" keeps it from being replaced.
    request = conversion(source, dest, dest_format="raw", overwrite=True)
    assert alice.convert(request).refusal().reason == "NOT_YOURS"
    waiting.until(lambda: os.listdir(ownerless) == ["dest.raw"], "the result alone")
