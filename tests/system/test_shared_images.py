"""Images that share blocks with what they were made of, whatever format either has."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from harness import images, waiting
from harness.agent import Agent, conversion
from harness.callers import ALICE, CONVERTCTL
from harness.daemon import Daemon
from harness.mounts import Mounts
from policies import Grant, Policy, Root

from convertd.v1 import convert_pb2 as pb
from convertd_daemon.job.files import image_locks

DISKS: Final = Root("disks", "{scratch}", mounts=True)
POLICY: Final = Policy(
    grants=[Grant(read=[DISKS], write=[DISKS], read_formats=["raw", "qcow2", "vmdk"])]
)

MIB: Final = images.MIB
BLOCK: Final = 4096
ROOMY_MIB: Final = 512
DATA_BYTES: Final = 2 * MIB
"""What images.small has of data."""


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def disk(mounts: Mounts, request: pytest.FixtureRequest) -> Path:
    """A file system that shares blocks."""
    return mounts.on_a_loop(request.param, request.param, ROOMY_MIB)


@pytest.fixture
def alice(disk: Path, daemon: Daemon) -> Agent:
    """Calls as uid 1234. The mounts come first: they are taken away when the daemon is gone."""
    assert disk.is_mount()
    return daemon.agent(ALICE)


@pytest.fixture
def here(disk: Path) -> Iterator[Path]:
    """An empty directory, with which all that a test made goes."""
    path = disk / "here"
    path.mkdir()
    yield path
    for left in path.iterdir():
        left.unlink()
    path.rmdir()


def raw(here: Path) -> Path:
    """A raw image of 8 MiB: 1 MiB of data, a hole, and 1 MiB of data."""
    return images.small(here / "in.raw")


def qcow2(here: Path, *options: str) -> Path:
    """The same as qcow2."""
    source = raw(here)
    made = images.converted(source, here / "in.qcow2", "qcow2", *options)
    source.unlink()
    return made


def chain(here: Path) -> Path:
    """An overlay of an overlay of a raw image; each hides something of what is under it."""
    raw(here).rename(here / "base.raw")
    for over, under, kind in (("mid", "base.raw", "raw"), ("top", "mid.qcow2", "qcow2")):
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", under, "-F", kind]
        subprocess.run([*argv, str(here / f"{over}.qcow2")], check=True)
    write(here / "mid.qcow2", "write -P 7 2M 1M", "write -z 0 256k")
    write(here / "top.qcow2", "write -P 9 2560k 1M", "write -z 7M 64k")
    return here / "top.qcow2"


def write(path: Path, *commands: str) -> None:
    """Write to a qcow2 as a guest would."""
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, str(path)], check=True, capture_output=True)


SOURCES: Final = {"raw": raw, "qcow2": qcow2, "chain": chain}


def kind_of(path: Path) -> str:
    """The format that a name here tells."""
    return path.suffix[1:]


def asked(
    source: Path,
    dest: Path,
    **fields: Any,  # noqa: ANN401 - the messages check their fields
) -> pb.ConvertRequest:
    """A request with the formats that the names tell."""
    formats = {"source_format": kind_of(source), "dest_format": kind_of(dest)}
    return conversion(source, dest, **formats, **fields)


def shared_bytes(path: Path) -> int:
    """How much of a file the file system shares with another."""
    told = subprocess.run(
        ["filefrag", "-v", "-b1", str(path)], check=True, capture_output=True, text=True
    ).stdout
    rows = [line.split(":") for line in told.splitlines() if line.lstrip()[:1].isdigit()]
    return sum(int(row[3]) for row in rows if "shared" in row[-1])


def check(path: Path) -> None:
    """See that a qcow2 is clean."""
    subprocess.run(["qemu-img", "check", "-q", str(path)], check=True)


# --- what is shared -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize("source", SOURCES)
def test_result_shares_all_data_with_its_source(
    alice: Agent, here: Path, source: str, kind: str
) -> None:
    """It takes no more than the tables of its format, and is what qemu-img would make."""
    image, dest = SOURCES[source](here), here / f"out.{kind}"
    call = alice.convert(asked(image, dest, reflink=pb.REFLINK_ALWAYS, verify=True))
    assert call.await_started().plan.method == pb.METHOD_REFLINK
    result = call.result()
    assert result.method == pb.METHOD_REFLINK
    assert images.identical(image, dest)
    assert result.shared_bytes == shared_bytes(dest) >= DATA_BYTES
    assert result.shared_bytes + result.written_bytes == result.allocated_size_bytes
    by_hand = images.converted(image, here / f"by-hand.{kind}", kind, "-f", kind_of(image))
    assert dest.stat().st_size == by_hand.stat().st_size
    if kind == "raw":
        assert result.written_bytes == 0
    else:
        check(dest)
        assert result.written_bytes <= 6 * 65536


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_result_stays_whole_without_its_source(alice: Agent, here: Path, kind: str) -> None:
    """Written to, or removed: the blocks are copied on write, and kept."""
    image, dest = qcow2(here), here / f"out.{kind}"
    alice.convert(asked(image, dest, reflink=pb.REFLINK_ALWAYS)).result()
    image.rename(here / "before.qcow2")
    subprocess.run(["cp", "--reflink=never", here / "before.qcow2", image], check=True)
    write(here / "before.qcow2", "write -P 5 0 8M")
    (here / "before.qcow2").unlink()
    assert images.identical(image, dest)


@pytest.mark.parametrize("size", [8 * MIB - 512, 3 * MIB + 100, 5000, 100, 1, 0])
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_last_block_of_an_image_may_be_a_part_of_one(
    alice: Agent, here: Path, size: int, kind: str
) -> None:
    """It is rounded up to a sector, as by qemu-img, with zeroes."""
    image, dest = here / "in.raw", here / f"out.{kind}"
    image.write_bytes(os.urandom(size))
    result = alice.convert(asked(image, dest, reflink=pb.REFLINK_ALWAYS)).result()
    assert result.virtual_size_bytes == -(-size // 512) * 512
    assert images.identical(image, dest)
    assert shared_bytes(dest) == size // BLOCK * BLOCK


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size_bytes": 4096},
        {"cluster_size_bytes": 2 * MIB},
        {"refcount_bits": 1},
        {"refcount_bits": 64, "lazy_refcounts": True},
        {"compat": pb.QCOW2_COMPAT_V2},
    ],
    ids=["small clusters", "large clusters", "one refcount bit", "lazy refcounts", "version 2"],
)
def test_result_has_the_options_that_were_asked_for(
    alice: Agent, here: Path, options: dict[str, Any]
) -> None:
    """And shares its data all the same."""
    image, dest = qcow2(here, "-o", "cluster_size=16k"), here / "out.qcow2"
    request = asked(image, dest, reflink=pb.REFLINK_ALWAYS, qcow2=pb.Qcow2Options(**options))
    alice.convert(request).result()
    check(dest)
    assert images.identical(image, dest)
    assert shared_bytes(dest) >= DATA_BYTES


def test_image_with_many_stretches_is_shared(alice: Agent, here: Path) -> None:
    """The list of them is longer than what is kept of an output."""
    image = here / "in.raw"
    block = os.urandom(BLOCK)
    with image.open("wb") as file:
        file.truncate(256 * MIB)
        for number in range(16384):
            os.pwrite(file.fileno(), block, number * 4 * BLOCK)
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "in.raw", "-F", "raw"]
    subprocess.run([*argv, str(here / "in.qcow2")], check=True)
    for kind in ("raw", "qcow2"):
        dest = here / f"out.{kind}"
        request = asked(here / "in.qcow2", dest, reflink=pb.REFLINK_ALWAYS)
        result = alice.convert(request).result()
        assert result.shared_bytes == shared_bytes(dest) == 16384 * BLOCK
        assert images.identical(here / "in.qcow2", dest)


def test_chain_is_shared_without_a_daemon(here: Path) -> None:
    """By the caller's own rights: the snapshot is the caller's, and no more than that."""
    image, dest = chain(here), here / "out.qcow2"
    for path in (here, *here.iterdir()):
        os.chown(path, ALICE.uid, ALICE.gid)
    ends = (str(image), str(dest), "-f", "qcow2", "-O", "qcow2")
    ran = ALICE.run([CONVERTCTL, "convert", "--local", *ends, "--reflink", "always"])
    assert ran.status == 0, ran.err
    assert images.identical(image, dest)
    assert shared_bytes(dest) >= DATA_BYTES


# --- what is not ---------------------------------------------------------------------------------


def compressed(here: Path) -> Path:
    """A qcow2 whose data is nowhere in its file as it is."""
    return qcow2(here, "-c")


def tiny_clusters(here: Path) -> Path:
    """A qcow2 whose clusters are smaller than a block."""
    return qcow2(here, "-o", "cluster_size=512")


def vmdk(here: Path) -> Path:
    """Another format."""
    return images.converted(raw(here), here / "in.vmdk", "vmdk")


def repeated(here: Path) -> Path:
    """A qcow2 of 64 MiB, all of which are one cluster of its file. Its reference counts say so."""
    cluster, tables = BLOCK, 32
    entries = cluster // 8
    clusters = [*(1, 1, 1, 1), tables, tables * entries]
    table, data = (number * cluster for number in (4, 5))
    header = struct.pack(
        *(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0, 0, 12, tables * entries * cluster),
        *(0, tables, 3 * cluster, cluster, 1, 0, 0),
    )
    parts = (
        header + struct.pack(">QQQII8x", 0, 0, 0, 6, 112),
        struct.pack(">Q", 2 * cluster),
        struct.pack(">6Q", *clusters),
        struct.pack(">Q", table) * tables,
        struct.pack(">Q", data) * entries,
        bytes(range(1, 129)) * (cluster // 128),
    )
    image = here / "in.qcow2"
    image.write_bytes(b"".join(part.ljust(cluster, b"\0") for part in parts))
    check(image)
    return image


REASONS: Final = {
    repeated: "the image uses parts of its file more than once",
    compressed: "the image has compressed data",
    tiny_clusters: f"the image's data is not aligned to blocks of {BLOCK} bytes",
    vmdk: "the image is vmdk, and only raw and qcow2 can share data",
}


@pytest.mark.parametrize("make", REASONS, ids=lambda make: make.__name__)
def test_source_that_can_not_be_shared_is_copied(
    alice: Agent,
    here: Path,
    make: Any,  # noqa: ANN401 - a function of this module
) -> None:
    """The plan says why; where sharing is demanded, it is refused for that reason."""
    image, dest = make(here), here / "out.qcow2"
    request = asked(image, dest, validate_only=True)
    plan = alice.convert(request).await_started().plan
    assert (plan.method, plan.method_reason) == (pb.METHOD_QEMU_IMG, REASONS[make])
    result = alice.convert(asked(image, dest)).result()
    assert (result.method, result.shared_bytes) == (pb.METHOD_QEMU_IMG, 0)
    assert images.identical(image, dest)
    dest.unlink()
    refusal = alice.convert(asked(image, dest, reflink=pb.REFLINK_ALWAYS)).refusal()
    assert refusal.reason == "REFLINK_NOT_POSSIBLE"
    assert refusal.metadata == {"path": str(image), "problem": REASONS[make]}
    assert not dest.exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"cluster_size_bytes": 512},
            f"the result's clusters are smaller than the file system's blocks ({BLOCK})",
        ),
        ({"extended_l2": True}, "the result has extended L2 entries"),
    ],
    ids=["tiny clusters", "extended L2 entries"],
)
def test_result_that_only_qemu_img_can_write_is_copied(
    alice: Agent, here: Path, options: dict[str, Any], problem: str
) -> None:
    """The refusal names the result then."""
    dest = here / "out.qcow2"
    request = asked(qcow2(here), dest, qcow2=pb.Qcow2Options(**options))
    assert alice.convert(request).result().method == pb.METHOD_QEMU_IMG
    dest.unlink()
    request.reflink = pb.REFLINK_ALWAYS
    refusal = alice.convert(request).refusal()
    assert refusal.reason == "REFLINK_NOT_POSSIBLE"
    assert refusal.metadata == {"path": str(dest), "problem": problem}


def test_chain_over_two_file_systems_is_copied(alice: Agent, here: Path, scratch: Path) -> None:
    """Its base is elsewhere."""
    base = images.small(scratch / "base.raw")
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw"]
    subprocess.run([*argv, str(here / "in.qcow2")], check=True)
    request = asked(here / "in.qcow2", here / "out.raw", validate_only=True)
    plan = alice.convert(request).await_started().plan
    assert plan.method_reason == "source and destination are in different file systems"


def test_few_compressed_clusters_cause_a_copy_of_all(alice: Agent, here: Path) -> None:
    """At the end of an image, too: the map is read to its end before anything is written."""
    image = qcow2(here)
    write(image, "write -c -P 3 6M 64k")
    result = alice.convert(asked(image, here / "out.raw")).result()
    assert result.method == pb.METHOD_QEMU_IMG
    assert images.identical(image, here / "out.raw")


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["in.raw", "in.qcow2", "base.raw", "mid.qcow2", "top.qcow2"])
def test_image_that_a_running_qemu_writes_is_refused(alice: Agent, here: Path, name: str) -> None:
    """Wherever it is in the chain, and although its lock is not on the snapshot."""
    make = {"in.raw": raw, "in.qcow2": qcow2}.get(name, chain)
    image, dest = make(here), here / "out.raw"
    argv = ["qemu-io", "-f", name.partition(".")[2], str(here / name)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as running:
        waiting.until(lambda: is_locked(here / name), "the lock of a running qemu")
        for reflink in (pb.REFLINK_AUTO, pb.REFLINK_ALWAYS, pb.REFLINK_NEVER):
            refusal = alice.convert(asked(image, dest, reflink=reflink)).refusal()
            assert (refusal.status, refusal.reason) == ("FAILED_PRECONDITION", "IMAGE_IN_USE")
        running.communicate(b"quit\n")
    alice.convert(asked(image, dest, reflink=pb.REFLINK_ALWAYS)).result()


def is_locked(path: Path) -> bool:
    """Whether a qemu says that it may write an image. Asked without a lock of our own."""
    with path.open("rb") as file:
        return image_locks.is_being_written(file.fileno())


def test_image_that_is_cut_off_is_refused(alice: Agent, here: Path) -> None:
    """Qemu reads zeroes beyond its end; nothing of it gets a name."""
    image = qcow2(here)
    os.truncate(image, image.stat().st_size - 3 * 65536)
    for kind in ("raw", "qcow2"):
        refusal = alice.convert(asked(image, here / f"out.{kind}")).refusal()
        assert refusal.reason == "IMAGE_REFUSED"
        assert os.listdir(here) == ["in.qcow2"]


def test_image_whose_tables_contradict_each_other_is_refused(alice: Agent, here: Path) -> None:
    """Two clusters of the disk in one of the file: qemu-img check tells."""
    image = qcow2(here)
    with image.open("r+b") as file:
        table = int.from_bytes(os.pread(file.fileno(), 8, 40), "big")
        second = int.from_bytes(os.pread(file.fileno(), 8, table), "big") & ~(1 << 63)
        os.pwrite(file.fileno(), os.pread(file.fileno(), 8, second), second + 8)
    refusal = alice.convert(asked(image, here / "out.raw", reflink=pb.REFLINK_ALWAYS)).refusal()
    assert refusal.reason == "IMAGE_REFUSED"
    assert os.listdir(here) == ["in.qcow2"]
