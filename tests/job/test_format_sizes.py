"""How large an image of each format can be: the largest is made, one sector more is refused."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from typing import Final

import grants
import pytest
import whole_job

from convertd_core import values

SECTOR: Final = 512
GIB: Final = 1024**3
TIB: Final = 1024**4

LARGEST: Final = {
    "vpc": ("vpc", "", 2040 * GIB),
    "vpc, fixed": ("vpc", "subformat=fixed", 2040 * GIB),
    "vhdx": ("vhdx", "", 64 * TIB),
    "vhdx, large blocks": ("vhdx", "block_size=268435456", 64 * TIB),
    "qed": ("qed", "", 64 * TIB),
    "qed, small clusters": ("qed", "cluster_size=4096,table_size=2", 4 * GIB),
    "qcow2, clusters of 512 bytes": ("qcow2", "cluster_size=512", 128 * GIB),
    "qcow2, subclusters": ("qcow2", "cluster_size=16384,extended_l2=on", 64 * TIB),
    "vmdk": ("vmdk", "", 256 * TIB - 32 * 1024**2),
}
"""Format, options, and the most that qemu-img 7.2 makes and opens again."""

OUT_OF_REACH: Final = {
    "vdi": ("vdi", "", 512 * TIB - 128 * 1024**2),
    "parallels": ("parallels", "", (2**29 - 2**18) * 1024**2),
    "parallels, small clusters": ("parallels", "cluster_size=512", (2**29 - 2**18) * 512),
}
"""Whose tables would take more memory than a conversion has by default."""


def source(path: Path, size_bytes: int) -> Path:
    """An image with nothing in it but its last sector."""
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", str(path)]
    subprocess.run([*argv, str(size_bytes)], check=True)
    if size_bytes:
        last = f"write -P 7 {size_bytes - SECTOR} {SECTOR}"
        subprocess.run(["qemu-io", "-c", last, str(path)], check=True, capture_output=True)
    return path


def converted(
    area: Path, image_format: str, options: str, size_bytes: int, **asked: object
) -> whole_job.JobEvents:
    """Convert such a source to `out`."""
    request = grants.request(source(area / "in", size_bytes), area / "out", "qcow2", image_format)
    pairs = (option.split("=") for option in options.split(",") if option)
    chosen = tuple(values.CreationOption(name=name, value=value) for name, value in pairs)
    request = dataclasses.replace(grants.to(request, options=chosen), **asked)  # type: ignore[arg-type]
    limits = grants.limits(virtual_size_bytes=2**62)
    return whole_job.run(grants.Rules(roots=(grants.files(area),), limits=limits).convert(request))


def last_sector_is_there(path: Path, image_format: str, size_bytes: int) -> bool:
    """Whether the result has what the source has."""
    read = f"read -P 7 {size_bytes - SECTOR} {SECTOR}"
    argv = ["qemu-io", "-r", "-f", image_format, "-c", read, str(path)]
    output = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    return "read 512/512" in output and "verification failed" not in output


@pytest.mark.parametrize("kind", LARGEST)
def test_largest_image_of_a_format_is_created(area: Path, kind: str) -> None:
    """What is said of the limits is not too little."""
    image_format, options, size = LARGEST[kind]
    assert converted(area, image_format, options, size).failure is None
    assert last_sector_is_there(area / "out", image_format, size)


@pytest.mark.parametrize("validate_only", [False, True], ids=["convert", "dry run"])
@pytest.mark.parametrize("kind", [*LARGEST, *OUT_OF_REACH])
def test_image_one_sector_over_the_limit_is_refused_with_the_limit(
    area: Path, kind: str, *, validate_only: bool
) -> None:
    """Before anything runs, as a request that can't be meant."""
    image_format, options, size = {**LARGEST, **OUT_OF_REACH}[kind]
    outcome = converted(area, image_format, options, size + SECTOR, validate_only=validate_only)
    assert outcome.reason == "SIZE_NOT_POSSIBLE"
    assert outcome.failure is not None
    values = dict(outcome.failure.values)
    assert (values["size_bytes"], values["most_bytes"]) == (str(size + SECTOR), str(size))
    assert str(outcome.failure.status) == "INVALID_ARGUMENT"
    assert not (area / "out").exists()


@pytest.mark.parametrize("kind", OUT_OF_REACH)
def test_tables_that_do_not_fit_into_memory_are_reported_as_such(area: Path, kind: str) -> None:
    """Not as data that is lost."""
    image_format, options, size = OUT_OF_REACH[kind]
    assert converted(area, image_format, options, size).reason == "OUT_OF_MEMORY"


EMPTY: Final = {
    "vmdk": ("vmdk", "", False),
    "vmdk, streamed": ("vmdk", "subformat=streamOptimized", False),
    "vpc, fixed": ("vpc", "subformat=fixed", False),
    "vpc": ("vpc", "", True),
    "raw": ("raw", "", True),
    "qcow2": ("qcow2", "", True),
    "vdi": ("vdi", "", True),
    "vdi, static": ("vdi", "static=on", True),
    "vhdx": ("vhdx", "", True),
    "qed": ("qed", "", True),
    "parallels": ("parallels", "", True),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_empty_image_is_created_or_refused_as_its_format_allows(area: Path, kind: str) -> None:
    """And refused, with the least that is possible, where qemu could not open it again."""
    image_format, options, is_possible = EMPTY[kind]
    outcome = converted(area, image_format, options, 0)
    if is_possible:
        assert outcome.failure is None
        return
    assert outcome.reason == "SIZE_NOT_POSSIBLE"
    assert outcome.failure is not None
    assert dict(outcome.failure.values)["least_bytes"] == "512"
    assert converted(area, image_format, options, SECTOR).failure is None


@pytest.mark.parametrize("options", ["cluster_size=8388608,table_size=2", "cluster_size=67108864"])
def test_image_tables_with_an_integer_overflow_in_qemu_are_refused(
    area: Path, options: str
) -> None:
    """A qed of which the tables could reach beyond 64 bits: qemu takes its size for 0."""
    outcome = converted(area, "qed", options, GIB)
    assert outcome.reason == "SIZE_NOT_POSSIBLE"
    assert outcome.failure is not None
    assert dict(outcome.failure.values)["most_bytes"] == "0"
