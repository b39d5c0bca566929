"""Images that promise more than anybody has: of bytes, tables, snapshots, members, time."""

from __future__ import annotations

import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import encrypting
import pytest
from harness import images, processes
from harness.agent import conversion
from harness.callers import ALICE, BOB
from harness.daemon import FRONT, QEMU_IMG, Daemon
from harness.fixtures import MakeDaemon
from hostile import forged, simple_calls
from hostile.forged import CLUSTER, Qcow2
from policies import IMAGES, Grant, Policy

POLICY: Final = Policy(
    limits={"virtual_size": "1 GiB", "duration": "10 s"},
    grants=[
        Grant(
            read=[IMAGES],
            write=[IMAGES],
            formats=["raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx", "qed", "parallels", "luks"],
        )
    ],
)

BOUND_S: Final = 240.0
"""No image may take longer to be refused, or to be converted for all it is worth."""

MIB: Final = 1024
"""In KiB, as memory is measured here."""


@pytest.fixture(autouse=True)
def unaffected(daemon: Daemon) -> Iterator[None]:
    """After each the daemon serves others, and has not grown."""
    pids = (daemon.pid, daemon.await_one(FRONT))
    before = [processes.anonymous_kib(pid) for pid in pids]
    began = time.monotonic()
    yield
    assert daemon.agent(BOB).access().uid == BOB.uid
    assert time.monotonic() - began < BOUND_S
    after = [processes.anonymous_kib(pid) for pid in pids]
    assert all(now < then + 16 * MIB for now, then in zip(after, before, strict=True))
    daemon.await_idle()


@pytest.fixture
def own_dir(images_dir: Path) -> Path:
    """A directory of the caller's."""
    os.chown(images_dir, ALICE.uid, ALICE.gid)
    return images_dir


def patched(data: bytes, at: int, value: bytes) -> bytes:
    """The same with some bytes replaced."""
    return data[:at] + value + data[at + len(value) :]


def empty(image_format: str, size_mib: int = 1, *options: str) -> Callable[[Path], bytes]:
    """What qemu-img creates."""

    def make(directory: Path) -> bytes:
        path = images.created(directory / "made", image_format, size_mib, *options)
        data = path.read_bytes()
        path.unlink()
        return data

    return make


def changed(make: Callable[[Path], bytes], at: int, value: bytes) -> Callable[[Path], bytes]:
    """An image with a field that lies."""
    return lambda directory: patched(make(directory), at, value)


def compressed_bomb(_: Path) -> bytes:
    """A gibibyte, each cluster of which is one and the same kilobyte, compressed."""
    path = _ / "made"
    raw = _ / "raw"
    raw.write_bytes(b"\xa5" * 2 * images.MIB)
    argv = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=2M"]
    subprocess.run([*argv, str(raw), str(path)], check=True)
    data = bytearray(path.read_bytes())
    (l1_at,) = struct.unpack_from(">Q", data, 40)
    (l1,) = struct.unpack_from(">Q", data, l1_at)
    l2_at = l1 & 0x00FF_FFFF_FFFF_FE00
    (entry,) = struct.unpack_from(">Q", data, l2_at)
    struct.pack_into(">512Q", data, l2_at, *[entry] * 512)
    struct.pack_into(">Q", data, 24, 1024 * images.MIB)
    path.unlink()
    raw.unlink()
    return bytes(data)


ANSWERS: Final = frozenset(
    {"OK", "FAILED_PRECONDITION", "DATA_LOSS", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
)

BIG: Final = 2**62
VHD_TABLE: Final = 512

BOMBS: Final[dict[str, tuple[str, Callable[[Path], bytes]]]] = {
    "qcow2 of 4 EiB": ("qcow2", lambda _: Qcow2(size=BIG).data()),
    "qcow2 of all bits": ("qcow2", lambda _: Qcow2(size=2**64 - 1).data()),
    "qcow2 of more than allowed": ("qcow2", lambda _: Qcow2(size=2**31).data()),
    "qcow2 with an L1 of 32 GiB": ("qcow2", lambda _: Qcow2(l1_entries=2**32 - 1).data()),
    "qcow2 with an L1 of 32 MiB": ("qcow2", lambda _: Qcow2(l1_entries=2**22).data()),
    "qcow2 with an L1 beyond the end": (
        "qcow2",
        lambda _: Qcow2(l1_entries=2**22, l1_offset=2**50).data(),
    ),
    "qcow2 with an L1 that is its header": ("qcow2", lambda _: Qcow2(l1_offset=0).data()),
    "qcow2 with clusters of 2 to the 63": ("qcow2", lambda _: Qcow2(cluster_bits=63).data()),
    "qcow2 with clusters of 2 MiB": ("qcow2", lambda _: Qcow2(cluster_bits=21).data()),
    "qcow2 with reference counts of 2 to the 63": (
        "qcow2",
        lambda _: Qcow2(refcount_order=63).data(),
    ),
    "qcow2 with a refcount table of 256 TiB": (
        "qcow2",
        lambda _: Qcow2(refcount_table_clusters=2**32 - 1).data(),
    ),
    "qcow2 with 4 billion snapshots": (
        "qcow2",
        lambda _: Qcow2(snapshots=2**32 - 1, snapshots_offset=CLUSTER).data(),
    ),
    "qcow2 with 20000 snapshots": (
        "qcow2",
        lambda _: (
            Qcow2(snapshots=20_000, snapshots_offset=5 * CLUSTER).data().ljust(64 * CLUSTER, b"\0")
        ),
    ),
    "qcow2 with snapshots of giant names": (
        "qcow2",
        lambda _: (
            Qcow2(snapshots=1000, snapshots_offset=5 * CLUSTER).data()
            + b"".join(
                struct.pack(">QIHHIIQII", 0, 0, 65535, 65535, 0, 0, 0, 0, 16) + b"n" * 131_086
                for _ in range(1000)
            )
        ),
    ),
    "qcow2 with 65535 bitmaps": ("qcow2", lambda _: Qcow2(bitmaps=65535).data()),
    "qcow2 that is a gibibyte of one kilobyte": ("qcow2", compressed_bomb),
    "vmdk of 8 EiB": ("vmdk", changed(empty("vmdk"), 12, struct.pack("<Q", 2**54))),
    "vmdk with giant grains": ("vmdk", changed(empty("vmdk"), 20, struct.pack("<Q", 2**40))),
    "vmdk with a giant descriptor": ("vmdk", changed(empty("vmdk"), 36, struct.pack("<Q", 2**40))),
    "vmdk with giant tables": ("vmdk", changed(empty("vmdk"), 44, struct.pack("<I", 2**32 - 1))),
    "vmdk with ten thousand extents": (
        "vmdk",
        lambda _: forged.flat_vmdk(*["/nowhere"] * 10_000),
    ),
    "vdi with 4 billion blocks": ("vdi", changed(empty("vdi"), 384, struct.pack("<I", 2**32 - 1))),
    "vdi of 8 EiB": ("vdi", changed(empty("vdi"), 368, struct.pack("<Q", 2**63))),
    "vpc with 4 billion blocks": (
        "vpc",
        changed(empty("vpc"), VHD_TABLE + 28, struct.pack(">I", 2**32 - 1)),
    ),
    "vpc with blocks of 2 GiB": (
        "vpc",
        changed(empty("vpc"), VHD_TABLE + 32, struct.pack(">I", 2**31)),
    ),
    "qed with an L1 of a gibibyte": (
        "qed",
        changed(empty("qed"), 4, struct.pack("<II", 64 * images.MIB, 16)),
    ),
    "qed of 8 EiB": ("qed", changed(empty("qed"), 48, struct.pack("<Q", 2**63 - 512))),
    "parallels with 4 billion blocks": (
        "parallels",
        changed(empty("parallels"), 32, struct.pack("<I", 2**32 - 1)),
    ),
    "parallels with giant tracks": (
        "parallels",
        changed(empty("parallels"), 28, struct.pack("<I", 2**31)),
    ),
}


@pytest.mark.parametrize(("image_format", "make"), BOMBS.values(), ids=tuple(BOMBS))
@pytest.mark.parametrize("is_stated", [True, False], ids=["stated", "unstated"])
def test_image_with_excessive_header_values_ends_in_a_result_or_a_condition(
    daemon: Daemon,
    own_dir: Path,
    image_format: str,
    make: Callable[[Path], bytes],
    is_stated: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """In time, and in the memory that there is. What comes of it is a condition, or a result."""
    image = simple_calls.file_of(ALICE, own_dir / "bomb.img", make(own_dir))
    stated = image_format if is_stated else ""
    out = own_dir / "out.raw"
    for answer in (
        simple_calls.inspect(daemon, image, stated),
        simple_calls.convert(daemon, image, out, stated),
    ):
        assert answer.status in ANSWERS
    if out.exists():
        assert out.stat().st_size <= 1024 * images.MIB
    assert set(os.listdir(own_dir)) <= {"bomb.img", "out.raw"}


def test_raw_file_larger_than_the_policy_allows_is_refused(daemon: Daemon, own_dir: Path) -> None:
    """It takes no block on the disk."""
    image = simple_calls.file_of(ALICE, own_dir / "bomb.img", b"")
    os.truncate(image, 2**40)
    assert simple_calls.convert(daemon, image, own_dir / "out", "raw").reason == "IMAGE_TOO_LARGE"


def test_backing_chain_with_a_loop_is_refused(daemon: Daemon, own_dir: Path) -> None:
    """By one member, by two, and by another name of the same file."""
    for name, backing in (("a", "a"), ("b", "c"), ("c", "b"), ("d", "e")):
        data = Qcow2(backing=backing, backing_format="qcow2").data()
        simple_calls.file_of(ALICE, own_dir / name, data)
    os.link(own_dir / "d", own_dir / "e")
    for name in ("a", "b", "d"):
        answer = simple_calls.convert(daemon, own_dir / name, own_dir / "out", "qcow2")
        assert answer.reason == "BACKING_REFUSED"
        assert simple_calls.inspect(daemon, own_dir / name, "qcow2").is_ok


def test_backing_chain_over_the_depth_limit_is_refused(
    make_daemon: MakeDaemon, own_dir: Path
) -> None:
    """A hundred members: each would be a process, a descriptor, and a rule."""
    daemon = make_daemon(POLICY.with_limits(duration="1 h"))
    daemon.start()
    for number in range(100):
        data = Qcow2(backing=f"{number + 1}", backing_format="qcow2").data()
        simple_calls.file_of(ALICE, own_dir / f"{number}", data)
    simple_calls.file_of(ALICE, own_dir / "100", Qcow2().data())
    answer = simple_calls.convert(daemon, own_dir / "0", own_dir / "out", "qcow2")
    assert answer.reason == "BACKING_REFUSED"
    assert "more than" in answer.message


def test_key_derivation_with_excessive_iterations_ends_with_the_job(
    daemon: Daemon, own_dir: Path
) -> None:
    """The header says how often it is hashed. The processor is busy, so nothing has stalled."""
    key = own_dir / "key"
    key.write_bytes(b"key")
    path = own_dir / "made"
    secret = f"secret,id=s,file={key}"
    options = ["-f", "luks", "--object", secret, "-o", "key-secret=s,iter-time=10"]
    encrypting.qemu_img("create", "-q", *options, path, "1M")
    # The first key slot: active, and then its iterations. Source: LUKS on-disk format, 1.2.
    data = patched(path.read_bytes(), 208 + 4, struct.pack(">I", 2**32 - 1))
    path.unlink()
    key.unlink()
    image = simple_calls.file_of(ALICE, own_dir / "bomb.img", data)
    request = conversion(image, own_dir / "out", source_format="luks", dest_format="raw")
    request.source.encryption.passphrase = b"key"
    assert (
        simple_calls.outcome_of(daemon.agent(ALICE).convert(request)).reason == "DURATION_EXCEEDED"
    )
    daemon.await_none(QEMU_IMG)


def test_qemu_img_has_resource_limits(daemon: Daemon, own_dir: Path) -> None:
    """Address space, descriptors, core dumps; and it waits behind whatever else runs."""
    image = simple_calls.file_of(ALICE, own_dir / "slow.raw", os.urandom(8 * images.MIB))
    request = conversion(
        image, own_dir / "out", dest_format="raw", rate_limit_bytes_per_second=images.MIB
    )
    call = daemon.agent(ALICE).convert(request)
    pid = daemon.await_one(QEMU_IMG)
    limits = Path(f"/proc/{pid}/limits").read_text(encoding="ascii")
    bounds = {line[:26].strip(): line[26:].split()[:2] for line in limits.splitlines()[1:]}
    assert bounds["Max address space"] == [str(1024**3)] * 2
    assert bounds["Max open files"] == ["256"] * 2
    assert bounds["Max core file size"] == ["1"] * 2
    assert os.getpriority(os.PRIO_PROCESS, pid) == 19
    call.cancel()
    call.end()
