"""The qcow2 that is written around placed data, beside what qemu-img makes of the same disk."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from harness import images

from convertd_core import values
from convertd_daemon.job.reflink import qcow2_writer
from convertd_daemon.job.reflink.extents import Extent
from convertd_daemon.job.reflink.qcow2_writer import Creation

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
TIB: Final = 1024 * GIB
BLOCK: Final = 4 * KIB
"""Less than a block of zeroes is data to qemu-img, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A raw image with data in some places, and its extents: data and zeroes, or data alone."""

    path: Path
    size: int
    extents: tuple[Extent, ...]


def disk(path: Path, size: int, stretches: Iterable[tuple[int, int]]) -> Disk:
    """A disk with random bytes at (start, length), and holes elsewhere."""
    extents = []
    with path.open("wb") as file:
        file.truncate(size)
        for start, length in stretches:
            file.seek(start)
            file.write(os.urandom(length))
            extents.append(Extent(start_bytes=start, length_bytes=length, offset_bytes=start))
    return Disk(path=path, size=size, extents=tuple(extents))


def written(path: Path, source: Disk, asked: Creation) -> qcow2_writer.Written:
    """Write it as a qcow2 here, with its data copied."""
    with path.open("w+b") as dest, source.path.open("rb") as data:

        def place(member: int, offset: int, dest_offset: int, length: int) -> None:
            assert member == 0
            os.pwrite(dest.fileno(), os.pread(data.fileno(), length, offset), dest_offset)

        return qcow2_writer.write(dest.fileno(), source.size, asked, source.extents, place)


def made_by_qemu_img(path: Path, source: Disk, asked: Creation) -> Path:
    """The same by qemu-img."""
    options = [
        f"cluster_size={asked.cluster_bytes}",
        f"refcount_bits={1 << asked.refcount_order}",
        f"compat={'1.1' if asked.version == 3 else '0.10'}",
        f"lazy_refcounts={'on' if asked.lazy_refcounts else 'off'}",
    ]
    formats = ("-f", "raw", "-O", "qcow2", "-o", ",".join(options))
    subprocess.run(["qemu-img", "convert", *formats, str(source.path), str(path)], check=True)
    return path


def answer(*argv: str | Path) -> Any:  # noqa: ANN401 - whatever JSON has
    """What qemu-img says, which has to be pleased."""
    command = ["qemu-img", argv[0], "--output=json", *map(str, argv[1:])]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def stretches_of(path: Path) -> list[tuple[bool, int]]:
    """Where a qcow2 has data, and how far each stretch goes, wherever it is in the file.

    A hole of the file within a cluster is data too; qemu-img sometimes looks for those as well.
    """
    found = answer("map", "-f", "qcow2", path)
    return [
        (has_data, sum(entry["length"] for entry in group))
        for has_data, group in itertools.groupby(found, lambda entry: bool(entry["data"]))
    ]


def check_clean(path: Path) -> None:
    """See that qemu-img finds nothing wrong, nor a cluster that nobody uses."""
    found = answer("check", "-f", "qcow2", path)
    assert not any(found.get(what) for what in ("corruptions", "leaks", "check-errors")), found
    assert found["image-end-offset"] >= path.stat().st_size


def assert_equals_what_qemu_img_writes(directory: Path, source: Disk, asked: Creation) -> None:
    """See that the result is as qemu-img's in all that can be asked of the two."""
    ours, theirs = directory / "ours.qcow2", directory / "theirs.qcow2"
    told = written(ours, source, asked)
    made_by_qemu_img(theirs, source, asked)
    assert told.length_bytes == ours.stat().st_size
    check_clean(ours)
    assert images.identical(source.path, ours)
    assert stretches_of(ours) == stretches_of(theirs)
    for what in ("format-specific", "cluster-size", "virtual-size"):
        assert answer("info", ours)[what] == answer("info", theirs)[what]
    # qemu-img gives a refcount table that has become too small a new place, half again as large.
    in_table = asked.cluster_bytes // 8 * (asked.cluster_bytes * 8 >> asked.refcount_order)
    if ours.stat().st_size <= in_table * asked.cluster_bytes:
        assert ours.stat().st_size == theirs.stat().st_size
    else:
        assert ours.stat().st_size <= theirs.stat().st_size


SIZES: Final = (512, 4 * KIB, 64 * KIB, 2 * MIB)


@pytest.mark.parametrize("cluster_bytes", SIZES)
@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
def test_result_is_as_qemu_img_makes_it(
    tmp_path: Path, cluster_bytes: int, refcount_bits: int
) -> None:
    """Of each size of clusters, and of refcounts."""
    asked = Creation(
        cluster_bits=cluster_bytes.bit_length() - 1, refcount_order=refcount_bits.bit_length() - 1
    )
    stretches = ((0, 100 * KIB), (2 * MIB, 2 * MIB + BLOCK), (5 * MIB - BLOCK, BLOCK))
    assert_equals_what_qemu_img_writes(tmp_path, disk(tmp_path / "raw", 8 * MIB, stretches), asked)


@pytest.mark.parametrize(
    "asked",
    [
        Creation(),
        Creation(lazy_refcounts=True),
        Creation(version=2),
        Creation(version=2, cluster_bits=12),
    ],
    ids=["default", "lazy_refcounts", "compat-0.10", "compat-0.10-4096"],
)
def test_result_has_the_options_that_qemu_img_gives_it(tmp_path: Path, asked: Creation) -> None:
    """As `info` tells of them."""
    assert_equals_what_qemu_img_writes(
        tmp_path, disk(tmp_path / "raw", MIB, [(BLOCK, BLOCK)]), asked
    )


DISKS: Final[dict[str, tuple[int, tuple[tuple[int, int], ...]]]] = {
    "nothing": (0, ()),
    "a sector": (512, ((0, 512),)),
    "all zeroes": (GIB, ()),
    "all data": (MIB, ((0, MIB),)),
    "a last sector": (3 * MIB + 512, ((3 * MIB, 512),)),
    "a last cluster that is half one": (MIB + 33 * KIB, ((MIB, 33 * KIB),)),
    "an end that is no whole cluster, without data": (MIB + 512, ((0, MIB),)),
    "below the second table": (600 * MIB, ((512 * MIB, MIB),)),
    "below two tables": (600 * MIB, ((512 * MIB - MIB, 2 * MIB),)),
    "below many tables": (TIB, tuple((n * 10 * GIB, BLOCK) for n in range(100))),
    "at the end of a large disk": (15 * TIB, ((15 * TIB - BLOCK, BLOCK),)),
}


@pytest.mark.parametrize("name", DISKS)
def test_result_of_any_size_is_as_qemu_img_makes_it(tmp_path: Path, name: str) -> None:
    """With clusters of 64 KiB, where an L2 table is for 512 MiB."""
    size, stretches = DISKS[name]
    assert_equals_what_qemu_img_writes(
        tmp_path, disk(tmp_path / "raw", size, stretches), Creation()
    )


@pytest.mark.parametrize("seed", range(20))
def test_random_disk_is_as_qemu_img_makes_it(tmp_path: Path, seed: int) -> None:
    """Data that begins and ends within clusters, and several stretches in one."""
    dice = random.Random(seed)  # noqa: S311 - to be repeated
    asked = Creation(cluster_bits=dice.randint(9, 21), refcount_order=dice.randint(0, 6))
    size = dice.randint(1, 2000) * BLOCK + dice.choice([0, 0, 512, 1536])
    blocks = sorted(dice.sample(range(size // BLOCK + 1), dice.randint(0, min(40, size // BLOCK))))
    stretches = [
        (block * BLOCK, min(dice.randint(1, 100), following - block) * BLOCK)
        for block, following in itertools.pairwise(blocks)
    ]
    assert_equals_what_qemu_img_writes(tmp_path, disk(tmp_path / "raw", size, stretches), asked)


@pytest.mark.parametrize("cluster_bits", [9, 10, 12])
def test_result_whose_refcount_table_does_not_fit_one_cluster_is_clean(
    tmp_path: Path, cluster_bits: int
) -> None:
    """It comes last then. With refcounts of 64 bits there are many."""
    size = {9: 40 * MIB, 10: 80 * MIB, 12: 5 * GIB}[cluster_bits]
    ends = [(0, 30 * MIB), (size - MIB, MIB)]
    source = disk(tmp_path / "raw", size, ends)
    ours = tmp_path / "ours.qcow2"
    written(ours, source, Creation(cluster_bits=cluster_bits, refcount_order=6))
    check_clean(ours)
    assert images.identical(source.path, ours)


def test_zeroes_in_a_list_of_extents_have_no_clusters(tmp_path: Path) -> None:
    """Nor have those that are not in it."""
    extents = (
        Extent(start_bytes=0, length_bytes=MIB),
        Extent(start_bytes=MIB, length_bytes=BLOCK, offset_bytes=0),
        Extent(start_bytes=MIB + BLOCK, length_bytes=MIB),
    )
    path = tmp_path / "ours.qcow2"
    placed = []
    with path.open("w+b") as file:

        def place(*where: int) -> None:
            placed.append(where)

        qcow2_writer.write(file.fileno(), 4 * MIB, Creation(), extents, place)
    assert len(placed) == 1
    assert stretches_of(path) == [(False, MIB), (True, 64 * KIB), (False, 3 * MIB - 64 * KIB)]


def test_data_keeps_its_place_within_a_cluster(tmp_path: Path) -> None:
    """So what is aligned to blocks of a file system stays so; and each member is told apart."""
    part = {"length_bytes": 3 * BLOCK}
    extents = (
        Extent(start_bytes=BLOCK, member=1, offset_bytes=5 * BLOCK, **part),
        Extent(start_bytes=6 * BLOCK, member=2, offset_bytes=0, **part),
        Extent(start_bytes=15 * BLOCK, member=0, offset_bytes=9 * BLOCK, **part),
    )
    placed = []
    with (tmp_path / "ours.qcow2").open("w+b") as file:

        def place(member: int, offset: int, dest_offset: int, length: int) -> None:
            placed.append((member, offset, dest_offset % (64 * KIB), length))

        qcow2_writer.write(file.fileno(), MIB, Creation(), extents, place)
    assert placed == [
        (1, 5 * BLOCK, BLOCK, 3 * BLOCK),
        (2, 0, 6 * BLOCK, 3 * BLOCK),
        (0, 9 * BLOCK, 15 * BLOCK, BLOCK),
        (0, 10 * BLOCK, 0, 2 * BLOCK),
    ]


def stretches(*pairs: tuple[int, int]) -> tuple[Extent, ...]:
    """Extents of data."""
    return tuple(
        Extent(start_bytes=start, length_bytes=length, offset_bytes=0) for start, length in pairs
    )


WRONG: Final = {
    "overlapping": stretches((0, 2 * BLOCK), (BLOCK, BLOCK)),
    "twice": stretches((0, BLOCK), (0, BLOCK)),
    "backwards": stretches((2 * BLOCK, BLOCK), (0, BLOCK)),
    "before the beginning": stretches((-BLOCK, 2 * BLOCK)),
    "beyond the end": stretches((MIB - BLOCK, 2 * BLOCK)),
    "after the end": stretches((2 * MIB, BLOCK)),
    "of no length": stretches((0, 0)),
    "of less than no length": stretches((BLOCK, -BLOCK)),
    "overlapping zeroes": (Extent(start_bytes=0, length_bytes=MIB), *stretches((0, BLOCK))),
}


@pytest.mark.parametrize("name", WRONG)
def test_extents_that_are_no_disk_are_refused(tmp_path: Path, name: str) -> None:
    """Whoever made them should have seen it; nothing is placed where something is already."""
    with (tmp_path / "ours.qcow2").open("w+b") as file, pytest.raises(ValueError, match="bytes"):
        qcow2_writer.write(file.fileno(), MIB, Creation(), WRONG[name], lambda *_: None)


def test_disk_that_is_too_large_for_its_clusters_is_refused(tmp_path: Path) -> None:
    """The L1 table would have more than qemu reads."""
    largest = 32 * MIB // 8 * 64 * 512
    with (tmp_path / "ours.qcow2").open("w+b") as file:
        small = Creation(cluster_bits=9)
        with pytest.raises(ValueError, match="too many"):
            qcow2_writer.write(file.fileno(), largest + 512, small, (), lambda *_: None)
        qcow2_writer.write(file.fileno(), largest, small, (), lambda *_: None)
    check_clean(tmp_path / "ours.qcow2")


def test_memory_does_not_grow_with_the_number_of_extents(tmp_path: Path) -> None:
    """Nor does it with the size of the disk: each is taken when its turn comes."""
    assert peak_bytes(tmp_path / "many", 20_000) < peak_bytes(tmp_path / "few", 200) + 256 * KIB


def peak_bytes(path: Path, count: int) -> int:
    """The most memory that Python had while it wrote so many extents, far apart."""
    apart = 33 * MIB

    def extents() -> Iterator[Extent]:
        for start in range(0, count * apart, apart):
            yield Extent(start_bytes=start, length_bytes=BLOCK, offset_bytes=start)

    with path.open("w+b") as file:
        tracemalloc.start()
        try:
            qcow2_writer.write(file.fileno(), count * apart, Creation(), extents(), lambda *_: None)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


def test_disk_of_many_tib_takes_no_space_for_what_has_no_data(tmp_path: Path) -> None:
    """Its L1 table has holes, too."""
    path, size = tmp_path / "ours.qcow2", 8000 * TIB
    far = Extent(start_bytes=size - BLOCK, length_bytes=BLOCK, offset_bytes=0)
    with path.open("w+b") as file:
        told = qcow2_writer.write(
            file.fileno(), size, Creation(cluster_bits=21), (far,), lambda *_: None
        )
    assert told.written_bytes < 5 * MIB
    assert path.stat().st_blocks * 512 < 5 * MIB
    check_clean(path)


@pytest.mark.parametrize(
    ("changes", "clause"),
    [
        ({}, ""),
        ({"format": "vmdk"}, "the result is no qcow2"),
        ({"compression": values.Compression.ZLIB}, "the result is compressed"),
        ({"compression": values.Compression.ZSTD}, "the result is compressed"),
        ({"encryption": values.DestinationEncryption()}, "the result is encrypted"),
        ({"preallocation": values.Preallocation.METADATA}, "the result is preallocated"),
        ({"options": {"extended_l2": "on"}}, "the result has extended L2 entries"),
        ({"options": {"extended_l2": "off"}}, ""),
        ({"options": {"data_file": "x"}}, "the result has an option that only qemu-img knows"),
        ({"options": {"compat": "0.10"}}, ""),
        (
            {"options": {"cluster_size": "512", "lazy_refcounts": "on", "refcount_bits": "1"}},
            "",
        ),
    ],
)
def test_options_that_only_qemu_img_writes_are_told(changes: dict[str, Any], clause: str) -> None:
    """In words for whoever asked for shared blocks and no less."""
    assert qcow2_writer.problem(destination(**changes)) == clause


def destination(**changes: Any) -> values.Destination:  # noqa: ANN401 - any field of it
    """A qcow2, with these changes."""
    options = tuple(
        values.CreationOption(name=name, value=value)
        for name, value in changes.pop("options", {}).items()
    )
    return values.Destination(**{"path": "/x", "format": "qcow2", "options": options, **changes})


def test_options_of_a_destination_are_what_is_written() -> None:
    """Those that are not given are qemu's defaults."""
    assert qcow2_writer.creation(destination()) == Creation()
    given = {
        "cluster_size": "2097152",
        "compat": "0.10",
        "lazy_refcounts": "on",
        "refcount_bits": "64",
    }
    assert qcow2_writer.creation(destination(options=given)) == Creation(
        cluster_bits=21, refcount_order=6, version=2, lazy_refcounts=True
    )
