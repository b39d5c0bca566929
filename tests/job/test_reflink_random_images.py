"""Random images, converted by shared blocks and by qemu-img: to a guest there is no difference.

How many is told by CONVERTD_TEST_RANDOM_IMAGES, which by CONVERTD_TEST_SEED.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import grants
import pytest
import random_images
import whole_job
from harness.mounts import Mounts

from convertd_core import results, values

IMAGES: Final = int(os.environ.get("CONVERTD_TEST_RANDOM_IMAGES", "50"))
SEED: Final = int(os.environ.get("CONVERTD_TEST_SEED", "1"))

KINDS: Final = ("xfs", "btrfs")
DISK_MIB: Final = 1024

SECTOR: Final = random_images.SECTOR
BLOCK_SECTORS: Final = random_images.BLOCK // SECTOR


@pytest.fixture(scope="module")
def disks(shared_area: Path) -> Iterator[tuple[Path, ...]]:
    """File systems that share blocks."""
    with Mounts(shared_area) as mounts:
        yield tuple(mounts.on_a_loop(kind, kind, DISK_MIB) for kind in KINDS)


@pytest.mark.timeout(300 + 2 * IMAGES)
def test_random_image_converted_by_sharing_equals_the_one_that_qemu_img_makes(
    disks: tuple[Path, ...],
) -> None:
    """Identical to `compare`, clean to `check`, and as long; to `map`, data in the same places."""
    tally: collections.Counter[str] = collections.Counter()
    for seed, disk in zip(range(SEED, SEED + IMAGES), itertools.cycle(disks), strict=False):
        directory = disk / "images"
        directory.mkdir()
        try:
            tally[examine(directory, seed)] += 1
        except Exception as error:
            error.add_note(f"CONVERTD_TEST_SEED={seed} CONVERTD_TEST_RANDOM_IMAGES=1, {disk.name}")
            raise
        shutil.rmtree(directory)
    print(dict(tally))  # noqa: T201 - the figures of a long run
    assert tally["shared"] + tally["shared, in whole clusters"] > IMAGES / 3


def examine(directory: Path, seed: int) -> str:
    """Convert one image both ways, and compare. Gives what was tried."""
    image, asked = random_images.image(directory, seed), random_images.result(seed)
    shareable = image.shareable and asked.shareable
    way = values.Reflink.ALWAYS if shareable else values.Reflink.AUTO
    ours = converted(image, asked, directory / "ours", way)
    if ours.method is not results.Method.REFLINK:
        check_identical(image, asked, directory / "ours")
        return "not shared"
    converted(image, asked, directory / "theirs", values.Reflink.NEVER)
    check_identical(image, asked, directory / "ours")
    assert_results_are_equal(asked, directory / "ours", directory / "theirs", whole=image.whole)
    return "shared, in whole clusters" if image.whole else "shared"


def converted(
    image: random_images.Image, asked: random_images.Result, dest: Path, reflink: values.Reflink
) -> results.ConvertResult:
    """Convert it by a job of its own."""
    rules = grants.Rules(roots=(grants.files(dest.parent),))
    request = grants.request(image.path, dest, image.format, asked.format)
    options = tuple(
        values.CreationOption(name=name, value=value) for name, value in asked.options.items()
    )
    request = grants.to(request, options=options)
    said = whole_job.run(rules.convert(dataclasses.replace(request, reflink=reflink)))
    assert said.failure is None, said.failure
    return said.published


def check_identical(image: random_images.Image, asked: random_images.Result, dest: Path) -> None:
    """See that a guest reads the same."""
    formats = ("-f", image.format, "-F", asked.format)
    random_images.qemu_img("compare", *formats, image.path, dest)


def assert_results_are_equal(
    asked: random_images.Result, ours: Path, theirs: Path, *, whole: bool
) -> None:
    """See that a result is as qemu-img's, in all that does not depend on what is read."""
    if asked.format == "qcow2":
        found = answer("check", ours, asked.format)
        assert not any(found.get(what) for what in ("corruptions", "leaks", "check-errors")), found
        for what in ("format-specific", "cluster-size", "virtual-size"):
            told = [answer("info", path, asked.format).get(what) for path in (ours, theirs)]
            assert told[0] == told[1]
    of_ours, of_theirs = (sectors_of(asked, path) for path in (ours, theirs))
    if whole:
        assert of_ours == of_theirs
        assert ours.stat().st_size == theirs.stat().st_size
    else:
        # A reader leaves out blocks of zeroes within clusters, and a map does not tell of them.
        assert of_ours >= of_theirs


def answer(what: str, path: Path, image_format: str) -> Any:  # noqa: ANN401 - whatever JSON has
    """What qemu-img says of it."""
    argv = ["qemu-img", what, "--output=json", "-f", image_format, str(path)]
    return json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)


def sectors_of(asked: random_images.Result, path: Path) -> set[int]:
    """The sectors that a map has data for.

    Not of the first block of a raw image: qemu-img writes it even if it is zeroes, for programs
    that find out by reading how direct I/O must be aligned. Source: block/file-posix.c.
    """
    begin = BLOCK_SECTORS if asked.format == "raw" else 0
    return {
        sector
        for entry in answer("map", path, asked.format)
        if entry["data"]
        for sector in range(
            max(entry["start"] // SECTOR, begin), (entry["start"] + entry["length"]) // SECTOR
        )
    }
