"""A file that holds only the beginning of an image is not converted, and one that holds all is."""

from __future__ import annotations

import dataclasses
import os
import random
import struct
import subprocess
from pathlib import Path
from typing import Final

import encrypting
import grants
import loop_devices
import pytest
import whole_job
from hostile import forged

from convertd_core import values

MIB: Final = 1024 * 1024
SECTOR: Final = 512

STREAM: Final = ("-c", "-o", "subformat=streamOptimized")

KINDS: Final = {
    "qcow2": ("qcow2", ()),
    "qcow2-compressed": ("qcow2", ("-c",)),
    "qcow2-zstd": ("qcow2", ("-c", "-o", "compression_type=zstd")),
    "qcow2-preallocated": ("qcow2", ("-o", "preallocation=metadata")),
    "qcow2-subclusters": ("qcow2", ("-o", "extended_l2=on")),
    "qcow2-small-clusters": ("qcow2", ("-o", "cluster_size=512")),
    "vmdk": ("vmdk", ()),
    "vmdk-stream": ("vmdk", STREAM),
    "vdi": ("vdi", ()),
    "vdi-static": ("vdi", ("-o", "static=on")),
    "vhdx": ("vhdx", ()),
    "vpc": ("vpc", ("-o", "force_size=on")),
    "qed": ("qed", ()),
    "parallels": ("parallels", ()),
}

REASONS: Final = {"qed": "READ_FAILED", "vmdk-stream": "READ_FAILED"}
"""What half of an image is refused with, where it is qemu itself that notices in the middle."""


def made(path: Path, image_format: str, *options: str, data: bytes) -> Path:
    """An image of these bytes, by qemu-img itself."""
    raw = path.with_suffix(".raw")
    raw.write_bytes(data)
    encrypting.qemu_img("convert", "-f", "raw", "-O", image_format, *options, raw, path)
    return path


def noise(size: int = 2 * MIB) -> bytes:
    """What does not compress, with a hole in it."""
    part = size // 4
    return os.urandom(part) + bytes(part) + os.urandom(size - 2 * part)


def words() -> bytes:
    """What compresses, and no whole number of clusters of it."""
    return Path("/usr/bin/qemu-img").read_bytes()[: MIB + 3 * SECTOR]


def converted(
    source: Path, image_format: str, *passphrases: bytes, dest: Path | None = None, **asked: object
) -> whole_job.JobEvents:
    """Convert an image to `out` beside it, by a whole job."""
    devices = () if dest is None else (grants.devices(dest.parent),)
    roots = (grants.files(source.parent), *devices)
    request = grants.request(source, dest or source.parent / "out", image_format)
    encryption = values.SourceEncryption() if passphrases else None
    source_ = dataclasses.replace(request.source, encryption=encryption)
    request = dataclasses.replace(request, source=source_, **asked)  # type: ignore[arg-type]
    return whole_job.run(grants.Rules(roots=roots).convert(request), *passphrases)


def cut(path: Path, size: int) -> Path:
    """Take away what is behind `size`."""
    os.truncate(path, size)
    return path


class TestCompleteImages:
    """None is refused that qemu itself would convert right."""

    @pytest.mark.parametrize("data", [noise(), words()], ids=["noise", "words"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_complete_image_is_converted(self, area: Path, kind: str, data: bytes) -> None:
        """Of each format, where its file ends in the middle of a cluster too."""
        image_format, options = KINDS[kind]
        source = made(area / "in", image_format, *options, data=data)
        assert converted(source, image_format).reason == "done"
        assert (area / "out").read_bytes() == data

    @pytest.mark.parametrize("image_format", ["qcow2", "vmdk", "vdi", "qed", "parallels"])
    @pytest.mark.parametrize("seed", range(4))
    def test_complete_image_with_guest_writes_is_converted(
        self, area: Path, image_format: str, seed: int
    ) -> None:
        """Here and there, zeroes and discards among it, in a disk of no round size."""
        chance = random.Random(seed)  # noqa: S311 - the same in each run
        size = SECTOR * chance.randrange(2000, 10000)
        source = area / "in"
        created = ["qemu-img", "create", "-q", "-f", image_format, str(source), str(size)]
        subprocess.run(created, check=True)
        said = []
        for _ in range(8):
            start, length = SECTOR * chance.randrange(1700), SECTOR * chance.randrange(1, 300)
            verb = chance.choice(["write", "write", "write -z", "discard"])
            said += ["-c", f"{verb} {start} {length}"]
        argv = ["qemu-io", "-d", "unmap", "-f", image_format, *said, str(source)]
        subprocess.run(argv, check=True, capture_output=True)
        assert converted(source, image_format).reason == "done"
        compare = ["qemu-img", "compare", "-f", image_format, "-F", "raw"]
        subprocess.run([*compare, str(source), str(area / "out")], check=True)

    def test_image_with_leaked_clusters_is_converted(self, area: Path) -> None:
        """A cluster that nothing leads to harms nobody; a crash leaves such."""
        source = made(area / "in", "qcow2", data=noise())
        with source.open("r+b") as file:
            l2 = _number(file.fileno(), _number(file.fileno(), 40))
            os.pwrite(file.fileno(), bytes(8), l2)
        assert _check_status(source) == 3
        assert converted(source, "qcow2").reason == "done"

    def test_image_that_was_not_closed_is_converted(self, area: Path) -> None:
        """Its reference counts are wrong, as its dirty flag says, and its data is right."""
        source = _not_closed(area / "in")
        assert _check_status(source) == 2
        outcome = converted(source, "qcow2")
        assert [warning.reason for warning in outcome.published.warnings] == ["SOURCE_DIRTY"]
        assert (area / "out").read_bytes()[:MIB] == b"\xcd" * MIB

    def test_encrypted_image_is_checked_with_its_passphrase(self, area: Path) -> None:
        """Which goes to each qemu-img by a pipe of its own; a wrong one is named as such."""
        secret = ["--object", "secret,id=s,data=secret"]
        options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1"
        source = made(area / "in", "qcow2", *secret, "-o", options, data=noise())
        assert converted(source, "qcow2", b"wrong").reason == "WRONG_SECRET"
        assert converted(source, "qcow2", b"secret").reason == "done"
        (area / "out").unlink()
        cut(source, source.stat().st_size // 2)
        assert converted(source, "qcow2", b"secret").reason == "IMAGE_REFUSED"

    def test_raw_image_is_not_checked(self, area: Path) -> None:
        """Half of an image is all of a raw one."""
        source = made(area / "in", "qcow2", data=noise())
        half = cut(source, source.stat().st_size // 2 // SECTOR * SECTOR)
        assert converted(half, "raw").reason == "done"
        assert (area / "out").read_bytes() == half.read_bytes()


class TestTruncatedImages:
    """What is cut off."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_image_truncated_to_half_is_refused(self, area: Path, kind: str) -> None:
        """Of each format. Nothing appears."""
        image_format, options = KINDS[kind]
        source = made(area / "in", image_format, *options, data=noise())
        cut(source, source.stat().st_size // 2 // SECTOR * SECTOR)
        assert converted(source, image_format).reason == REASONS.get(kind, "IMAGE_REFUSED")
        assert not (area / "out").exists()

    @pytest.mark.parametrize("kind", ["qcow2", "qcow2-preallocated", "vmdk", "vdi", "parallels"])
    def test_image_without_its_last_sector_is_refused(self, area: Path, kind: str) -> None:
        """Which qemu-img check forgives."""
        image_format, options = KINDS[kind]
        source = made(area / "in", image_format, *options, data=noise())
        size = source.stat().st_size
        cut(source, size - SECTOR)
        failure = converted(source, image_format).failure
        assert failure is not None
        assert (
            f"its data reaches byte {size}, but the file ends at byte {size - SECTOR}"
            in failure.message
        )

    def test_image_with_a_truncated_table_is_refused(self, area: Path) -> None:
        """All that it leads to would read as zeroes, and `map` shows nothing of it."""
        source = area / "in"
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", str(source)]
        subprocess.run([*argv, "8M"], check=True)
        _write(source, "write -P 1 0 64k")
        first = source.stat().st_size
        _write(source, "write -P 2 4M 64k")
        cut(source, first)
        listed = ["qemu-img", "map", "--output=json", str(source)]
        assert subprocess.run(listed, check=True, capture_output=True).stdout.count(b"offset") == 1
        assert converted(source, "qcow2").reason == "IMAGE_REFUSED"

    def test_truncated_image_that_was_not_closed_is_refused(self, area: Path) -> None:
        """For what is missing, and not for its reference counts, which whole ones have too."""
        source = _not_closed(area / "in")
        cut(source, source.stat().st_size // 2)
        failure = converted(source, "qcow2").failure
        assert failure is not None
        assert "its tables lead beyond its end" in failure.message

    def test_truncated_backing_file_is_refused_by_name(self, area: Path) -> None:
        """And named."""
        base = made(area / "base", "qcow2", data=noise())
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base"]
        subprocess.run([*argv, str(area / "in")], check=True)
        assert converted(area / "in", "qcow2").reason == "done"
        (area / "out").unlink()
        cut(base, base.stat().st_size // 2)
        failure = converted(area / "in", "qcow2").failure
        assert failure is not None
        assert (failure.reason, dict(failure.values)["path"]) == ("IMAGE_REFUSED", str(base))

    def test_validation_refuses_a_truncated_image(self, area: Path) -> None:
        """It is a check like the others."""
        source = made(area / "in", "vdi", data=noise())
        cut(source, source.stat().st_size // 2)
        assert converted(source, "vdi", validate_only=True).reason == "IMAGE_REFUSED"

    def test_truncated_image_is_refused_before_a_device_is_written(self, area: Path) -> None:
        """Whose content would be undefined: it is asked before."""
        source = made(area / "in", "qcow2", data=noise())
        cut(source, source.stat().st_size // 2)
        with loop_devices.made(area) as volumes:
            device = volumes.add("lv", 4 * MIB)
            failure = converted(source, "qcow2", dest=device).failure
            assert failure is not None
            assert failure.reason == "IMAGE_REFUSED"
            assert "undefined" not in failure.message
            assert volumes.bytes_on(device) == b"\xaa" * 4 * MIB


class TestLargeParallelsImages:
    """One of 1 TiB and more, which qemu-img can convert, and not map at once."""

    SIZE_TIB = 3

    @pytest.fixture
    def large(self, area: Path) -> Path:
        """Data at its beginning, at its end, and where one piece of the map meets the next."""
        source = area / "in"
        size = f"{self.SIZE_TIB}T"
        argv = ["qemu-img", "create", "-q", "-f", "parallels", str(source), size]
        subprocess.run(argv, check=True)
        said = ["write -P 1 0 64k", "write -P 2 549755747328 128k", "write -P 3 3298534817792 64k"]
        commands = [word for line in said for word in ("-c", line)]
        argv = ["qemu-io", "-f", "parallels", *commands, str(source)]
        subprocess.run(argv, check=True, capture_output=True)
        return source

    def asked(self, source: Path) -> whole_job.JobEvents:
        """Have all its checks done. To write 3 TiB, even of nothing, takes longer."""
        limits = grants.limits(virtual_size_bytes=2**63 - 1)
        rules = grants.Rules(roots=(grants.files(source.parent),), limits=limits)
        request = grants.request(source, source.parent / "out", "parallels", "qcow2")
        return whole_job.run(rules.convert(dataclasses.replace(request, validate_only=True)))

    def test_complete_parallels_image_of_1_tib_is_converted(self, large: Path) -> None:
        """It is asked about piece by piece."""
        argv = ["qemu-img", "map", "-f", "parallels", str(large)]
        assert subprocess.run(argv, check=False, capture_output=True).returncode < 0
        assert self.asked(large).reason == "done"

    def test_large_parallels_image_without_its_last_sector_is_refused(self, large: Path) -> None:
        """Wherever in the disk that is."""
        size = large.stat().st_size
        cut(large, size - SECTOR)
        failure = self.asked(large).failure
        assert failure is not None
        assert (
            f"its data reaches byte {size}, but the file ends at byte {size - SECTOR}"
            in failure.message
        )

    def test_smallest_parallels_image_that_crashes_qemu_img_map_is_converted(
        self, area: Path
    ) -> None:
        """In whole, with its data."""
        source = area / "in"
        argv = ["qemu-img", "create", "-q", "-f", "parallels", str(source), "1T"]
        subprocess.run(argv, check=True)
        said = ["-c", "write -P 7 1099511562240 64k"]
        argv = ["qemu-io", "-f", "parallels", *said, str(source)]
        subprocess.run(argv, check=True, capture_output=True)
        rules = grants.Rules(roots=(grants.files(area),))
        request = grants.request(source, area / "out", "parallels", "qcow2")
        assert whole_job.run(rules.convert(request)).reason == "done"
        read = ["qemu-io", "-r", "-f", "qcow2", "-c", "read -P 7 1099511562240 64k"]
        seen = subprocess.run([*read, str(area / "out")], check=True, capture_output=True).stdout
        assert b"Pattern verification failed" not in seen


class TestHostileImages:
    """Made to be examined for ever, or not at all."""

    def test_check_of_a_hostile_image_ends_at_the_time_limit(self, area: Path) -> None:
        """Snapshots that nobody converts, each with tables to follow."""
        source = _with_snapshots(area / "in", 4000)
        limits = grants.limits(duration_seconds=3.0)
        rules = grants.Rules(roots=(grants.files(area),), limits=limits)
        outcome = whole_job.run(rules.convert(grants.request(source, area / "out", "qcow2")))
        assert outcome.reason == "DURATION_EXCEEDED"
        assert not (area / "out").exists()

    def test_image_whose_check_needs_too_much_memory_is_refused(self, area: Path) -> None:
        """A count for each of the clusters that such a file could have."""
        source = made(area / "in", "qcow2", "-o", "cluster_size=512,refcount_bits=64", data=noise())
        cut(source, 100 * 1024 * MIB)
        failure = converted(source, "qcow2").failure
        assert failure is not None
        assert failure.reason == "IMAGE_REFUSED"
        assert "memory" in failure.message


def _write(path: Path, *said: str) -> None:
    """Have a guest do something."""
    commands = [word for line in said for word in ("-c", line)]
    subprocess.run(
        ["qemu-io", "-f", "qcow2", *commands, str(path)], check=True, capture_output=True
    )


def _not_closed(path: Path) -> Path:
    """An image that its qemu left by crashing: reference counts come last, with this option."""
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", str(path), "4M"]
    subprocess.run(argv, check=True)
    said = ["-c", "write 0 1M", "-c", "flush", "-c", "abort"]
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", *said, str(path)], check=False, capture_output=True
    )
    assert done.returncode < 0
    return path


def _with_snapshots(path: Path, count: int) -> Path:
    """An image with so many snapshots, all of one long table that leads nowhere new."""
    entries = 4 * MIB // 8
    l1_offset = 5 * forged.CLUSTER
    table_offset = l1_offset + 4 * MIB
    data = forged.Qcow2(snapshots=count, snapshots_offset=table_offset).data()
    l1 = struct.pack(">Q", 4 * forged.CLUSTER) * entries
    snapshots = b"".join(
        _snapshot(l1_offset, entries, f"{number}".encode()) for number in range(count)
    )
    end = -len(snapshots) % forged.CLUSTER
    path.write_bytes(data + l1 + snapshots + bytes(end))
    return path


def _snapshot(l1_offset: int, entries: int, name: bytes) -> bytes:
    """An entry of the snapshot table. Source: qemu docs/interop/qcow2.txt."""
    extra = struct.pack(">QQ", 0, forged.SIZE)
    fixed = struct.pack(">QIHHIIQII", l1_offset, entries, len(name), len(name), 0, 0, 0, 0, 16)
    entry = fixed + extra + name + name
    return entry + bytes(-len(entry) % 8)


def _number(fd: int, offset: int) -> int:
    """A number of eight bytes in an image, without the flags of a table's entry."""
    (number,) = struct.unpack(">Q", os.pread(fd, 8, offset))
    return int(number & 0x00FFFFFFFFFFFE00)


def _check_status(path: Path) -> int:
    """What qemu-img check exits with."""
    argv = ["qemu-img", "check", "-q", "-f", "qcow2", str(path)]
    return subprocess.run(argv, check=False, capture_output=True).returncode
