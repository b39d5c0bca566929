"""A small raw image that the job copies itself, beside what qemu-img makes of it."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any, Final

import grants
import pytest
import whole_job
from harness.mounts import Mounts

from convertd_core import results, values
from convertd_daemon.job import small_copy
from convertd_daemon.job.files import image_locks

KIB: Final = 1024
MIB: Final = 1024 * KIB

Stretches = tuple[tuple[int, int], ...]

DISKS: Final[dict[str, tuple[int, Stretches]]] = {
    "data everywhere": (MIB, ((0, MIB),)),
    "a hole in the middle": (4 * MIB, ((0, 100 * KIB), (3 * MIB, 8 * KIB))),
    "no data": (4 * MIB, ()),
    "nothing at all": (0, ()),
    "one byte": (1, ((0, 1),)),
    "half a sector too much": (MIB + 256, ((MIB - 4 * KIB, 4 * KIB + 256),)),
    "a hole at the end": (MIB, ((64 * KIB, 512),)),
    "pieces that share a cluster": (MIB, ((4 * KIB, 4 * KIB), (16 * KIB, 4 * KIB))),
    "much more hole than data": (1 << 40, ((1 << 39, 4 * KIB), ((1 << 40) - 512, 512))),
}

OPTIONS: Final[dict[str, dict[str, str]]] = {
    "default": {},
    "small clusters": {"cluster_size": "4096"},
    "large clusters": {"cluster_size": str(2 * MIB)},
    "old": {"compat": "0.10"},
    "lazy": {"lazy_refcounts": "on", "refcount_bits": "64"},
}


def made(path: Path, size: int, stretches: Stretches) -> Path:
    """A raw image with random bytes at (start, length); in some of it, zeroes that are no hole."""
    chance = random.Random(size)  # noqa: S311 - the same each time
    with path.open("wb") as file:
        file.truncate(size)
        for start, length in stretches:
            file.seek(start)
            file.write(chance.randbytes(length))
    return path


def grant_for(area: Path, dest_format: str, **options: str) -> values.ConvertGrant:
    """Leave to convert `in`, which is raw, to `out`."""
    request = grants.request(area / "in", area / "out", dest_format=dest_format)
    given = tuple(values.CreationOption(name=name, value=value) for name, value in options.items())
    rules = grants.Rules(roots=(grants.files(area, reflink=False),))
    return rules.convert(grants.to(request, options=given))


def asking(grant: values.ConvertGrant, **changes: object) -> values.ConvertGrant:
    """The same grant, for a request that differs."""
    return dataclasses.replace(grant, request=dataclasses.replace(grant.request, **changes))  # type: ignore[arg-type]


def by_qemu_img(area: Path, dest_format: str, **options: str) -> None:
    """Have qemu-img make `theirs` of `in`."""
    asked = ",".join(f"{name}={value}" for name, value in options.items())
    argv = [
        "qemu-img",
        "convert",
        "-f",
        "raw",
        "-O",
        dest_format,
        *(["-o", asked] if asked else []),
    ]
    subprocess.run([*argv, str(area / "in"), str(area / "theirs")], check=True)


def answer(*argv: str | Path) -> Any:  # noqa: ANN401 - whatever JSON has
    """What qemu-img says, which has to be pleased."""
    command = ["qemu-img", argv[0], "--output=json", *map(str, argv[1:])]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def stretches_of(path: Path, image_format: str, first_byte: int) -> list[tuple[int, int, Any]]:
    """The stretches of an image from there on: start, end, and whether it is data, and zero."""
    merged: list[tuple[int, int, Any]] = []
    for one in answer("map", "-f", image_format, path):
        start, end = max(one["start"], first_byte), one["start"] + one["length"]
        kind = (one["data"], one["zero"])
        if start >= end:
            continue
        if merged and merged[-1][2] == kind:
            start, *_ = merged.pop()
        merged.append((start, end, kind))
    return merged


def check_same(area: Path, image_format: str) -> None:
    """See that `out` and `theirs` are the same disk, with the same holes, in files as long."""
    ours, theirs = area / "out", area / "theirs"
    formats = ("-f", image_format, "-F", image_format)
    argv = ["qemu-img", "compare", *formats, str(ours), str(theirs)]
    subprocess.run(argv, check=True, capture_output=True)
    # qemu allocates the first block of a raw file, to find its alignment. Source: file-posix.c.
    first = 4 * KIB if image_format == "raw" else 0
    assert stretches_of(ours, image_format, first) == stretches_of(theirs, image_format, first)
    assert ours.stat().st_size == theirs.stat().st_size


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("size", "stretches"), DISKS.values(), ids=DISKS)
def test_copied_qcow2_is_the_one_that_qemu_img_makes(
    area: Path, size: int, stretches: Stretches, options: dict[str, str]
) -> None:
    """The same disk, the same map, as long, and clean."""
    if size > MIB * MIB // 2 and options.get("cluster_size") == "4096":
        size, stretches = size // 2, ((size // 4, 4 * KIB),)
    made(area / "in", size, stretches)
    said = whole_job.run(grant_for(area, "qcow2", **options))
    assert said.published.method is said.plan.method is results.Method.COPY
    by_qemu_img(area, "qcow2", **options)
    check_same(area, "qcow2")
    assert answer("check", area / "out")["check-errors"] == 0
    info = answer("info", area / "out")
    expected = answer("info", area / "theirs")
    assert info["format-specific"] == expected["format-specific"]
    assert info["virtual-size"] == expected["virtual-size"]
    assert info["cluster-size"] == expected["cluster-size"]


@pytest.mark.parametrize(("size", "stretches"), DISKS.values(), ids=DISKS)
def test_copied_raw_image_is_the_one_that_qemu_img_makes(
    area: Path, size: int, stretches: Stretches
) -> None:
    """The same bytes, with the same holes, up to a whole sector."""
    made(area / "in", size, stretches)
    said = whole_job.run(grant_for(area, "raw"))
    assert said.published.method is results.Method.COPY
    by_qemu_img(area, "raw")
    check_same(area, "raw")


@pytest.mark.parametrize("dest_format", ["raw", "qcow2"])
def test_zeroes_in_the_source_take_no_space_in_a_copy(area: Path, dest_format: str) -> None:
    """Where they fill a cluster, or in a raw result 4 KiB."""
    data = os.urandom(4 * KIB)
    cluster = 64 * KIB
    piece = (bytes(4 * KIB) + data).ljust(cluster, b"\0") + bytes(cluster) + data * 16
    (area / "in").write_bytes(piece * 5)
    said = whole_job.run(grant_for(area, dest_format))
    assert said.published.method is results.Method.COPY
    by_qemu_img(area, dest_format)
    check_same(area, dest_format)
    assert (area / "out").stat().st_blocks <= (area / "theirs").stat().st_blocks


@pytest.mark.parametrize("seed", range(8))
def test_copies_of_random_images_are_those_that_qemu_img_makes(area: Path, seed: int) -> None:
    """Data, zeroes and holes of any length at any place."""
    chance = random.Random(seed)  # noqa: S311 - the same each time
    size = chance.randrange(1, 6 * MIB)
    with (area / "in").open("wb") as file:
        file.truncate(size)
        for _ in range(chance.randrange(12)):
            start = chance.randrange(size)
            length = min(size - start, chance.choice((512, 4 * KIB, 64 * KIB, 300_000)))
            file.seek(start)
            file.write(bytes(length) if chance.random() < 0.3 else chance.randbytes(length))
    options = {"cluster_size": str(chance.choice((4, 16, 64, 512)) * KIB)}
    assert whole_job.run(grant_for(area, "qcow2", **options)).plan.method is results.Method.COPY
    by_qemu_img(area, "qcow2", **options)
    check_same(area, "qcow2")
    assert answer("check", area / "out")["check-errors"] == 0


def test_caller_of_a_copy_is_told_how_it_was_made(area: Path) -> None:
    """Through the page cache; nothing is shared."""
    made(area / "in", MIB, ((0, MIB),))
    done = whole_job.run(grant_for(area, "qcow2"))
    assert done.plan.source_cache.mode is done.plan.dest_cache.mode is values.CacheMode.WRITEBACK
    assert "at most 8 MiB" in done.plan.method_reason
    assert done.published.shared_bytes == 0
    assert done.published.written_bytes == (area / "out").stat().st_blocks * 512


def test_validation_of_a_copy_writes_nothing(area: Path) -> None:
    """But tells how it would be done."""
    made(area / "in", MIB, ((0, MIB),))
    said = whole_job.run(asking(grant_for(area, "qcow2"), validate_only=True))
    assert said.plan.method is results.Method.COPY
    assert os.listdir(area) == ["in"]


def test_copy_is_compared_with_its_source_where_that_is_asked(area: Path) -> None:
    """By qemu-img."""
    made(area / "in", MIB, ((0, MIB),))
    said = whole_job.run(asking(grant_for(area, "qcow2"), verify=True))
    assert said.published.verified
    assert said.published.method is results.Method.COPY


@pytest.mark.parametrize(
    ("dest_format", "changes", "asked"),
    [
        ("qcow2", {"cache_mode": values.CacheMode.WRITEBACK}, {}),
        ("qcow2", {"rate_limit_bytes_per_second": 64 * MIB}, {}),
        ("qcow2", {}, {"preallocation": values.Preallocation.METADATA}),
        ("raw", {}, {"preallocation": values.Preallocation.FULL}),
        ("qcow2", {}, {"compression": values.Compression.ZLIB}),
        ("vmdk", {}, {}),
        ("qcow2", {}, {"options": (values.CreationOption(name="cluster_size", value="2048"),)}),
        ("qcow2", {}, {"options": (values.CreationOption(name="extended_l2", value="on"),)}),
    ],
    ids=[
        "a cache mode",
        "a rate",
        "preallocation",
        "preallocation of raw",
        "compression",
        "another format",
        "clusters smaller than a block",
        "extended L2 entries",
    ],
)
def test_requests_for_more_than_the_bytes_are_left_to_qemu_img(
    area: Path, dest_format: str, changes: dict[str, object], asked: dict[str, object]
) -> None:
    """It knows how."""
    made(area / "in", MIB, ((0, MIB),))
    grant = asking(grant_for(area, dest_format), **changes)
    grant = dataclasses.replace(grant, request=grants.to(grant.request, **asked))
    assert whole_job.run(grant).published.method is results.Method.QEMU_IMG


def test_source_in_another_format_is_left_to_qemu_img(area: Path) -> None:
    """Nothing of an image is parsed by a job."""
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", str(area / "in"), "1M"]
    subprocess.run(argv, check=True)
    rules = grants.Rules(roots=(grants.files(area, reflink=False),))
    request = grants.request(area / "in", area / "out", "qcow2", "raw")
    assert whole_job.run(rules.convert(request)).published.method is results.Method.QEMU_IMG


@pytest.mark.parametrize(
    ("size", "stretches"),
    [
        (16 * MIB, ((0, small_copy.MOST_BYTES + 4 * KIB),)),
        (
            256 * MIB,
            tuple((n * 64 * KIB, 4 * KIB) for n in range(small_copy.MOST_STRETCHES + 1)),
        ),
    ],
    ids=["much data", "data in many places"],
)
def test_images_with_much_data_are_left_to_qemu_img(
    area: Path, size: int, stretches: Stretches
) -> None:
    """It reports progress, and does not fill the page cache."""
    made(area / "in", size, stretches)
    assert whole_job.run(grant_for(area, "qcow2")).plan.method is results.Method.QEMU_IMG


def test_file_system_that_knows_no_holes_is_left_to_qemu_img(area: Path, mounts: Mounts) -> None:
    """All of a large file is data there."""
    point = mounts.by_fuse(area, "fuse")
    made(area / "in", 16 * MIB, ((0, 4 * KIB),))
    rules = grants.Rules(
        roots=(
            grants.files(area, reflink=False),
            grants.files(point, name="fuse", reflink=False),
        )
    )
    request = grants.request(point / "in", area / "out", dest_format="qcow2")
    assert whole_job.run(rules.convert(request)).published.method is results.Method.QEMU_IMG


def test_small_source_that_a_qemu_writes_is_refused(area: Path) -> None:
    """As for a larger one, by qemu-img."""
    made(area / "in", MIB, ((0, MIB),))
    argv = ["qemu-io", "-f", "raw", str(area / "in")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write(b"length\n")
        writer.stdin.flush()
        assert writer.stdout.readline()
        assert whole_job.run(grant_for(area, "qcow2")).reason == "IMAGE_IN_USE"
        writer.stdin.close()
    assert whole_job.run(grant_for(area, "qcow2")).reason == "done"


def test_reader_that_is_no_writer_does_not_hinder_a_copy(area: Path) -> None:
    """As two qemu-img may read one image."""
    made(area / "in", MIB, ((0, MIB),))
    with (area / "in").open("rb") as other:
        assert image_locks.lock_for_reading(other.fileno())
        assert whole_job.run(grant_for(area, "qcow2")).published.method is results.Method.COPY


def test_qemu_does_not_write_a_source_while_it_is_copied(area: Path) -> None:
    """The lock is that of a qemu-img that reads."""
    path = made(area / "in", MIB, ((0, MIB),))
    with path.open("rb") as source:
        assert image_locks.lock_for_reading(source.fileno())
        argv = ["qemu-io", "-f", "raw", "-c", "write 0 512", str(path)]
        ran = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert ran.returncode != 0
    assert "lock" in ran.stderr
    subprocess.run(argv, check=True, capture_output=True)


def test_disk_that_a_copy_fills_has_no_space(area: Path, mounts: Mounts) -> None:
    """It holds the data, but not the tables. Nothing is left on it."""
    point = mounts.in_memory("tmpfs", "full", "mode=755,size=1m")
    made(area / "in", MIB, ((0, MIB),))
    images = (grants.files(area, reflink=False), grants.files(point, name="full", reflink=False))
    request = grants.request(area / "in", point / "out", dest_format="qcow2")
    said = whole_job.run(grants.Rules(roots=images).convert(request))
    assert said.plan.method is results.Method.COPY
    assert said.reason == "NO_SPACE"
    assert said.failure is not None
    assert int(dict(said.failure.values)["needed_bytes"]) > MIB
    assert os.listdir(point) == []
