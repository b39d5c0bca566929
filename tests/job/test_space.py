"""Whether there is room, and what is said where there is not."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import grants
import pytest
import refusals
from harness.mounts import Mounts

from convertd_daemon.job.files import paths, space

MIB = 1024 * 1024


@contextlib.contextmanager
def target_in(directory: Path) -> Iterator[paths.Target]:
    """Where a result would be."""
    rules = grants.Rules(roots=(grants.files(directory),))
    request = grants.request(directory / "never-read", directory / "new")
    with paths.open_target(rules.convert(request)) as target:
        yield target


def test_image_that_fits_is_not_refused(mounts: Mounts) -> None:
    """To the last byte."""
    with target_in(mounts.in_memory("tmpfs", "small", "mode=755,size=1m")) as target:
        free = space.free_bytes(target)
        assert 0 < free <= MIB
        space.check(target, free)
        failure = refusals.refusal_of(lambda: space.check(target, free + 1))
        assert failure is not None
        assert failure.reason == "NO_SPACE"


def test_image_that_does_not_fit_is_refused_with_sizes_and_mount_point(mounts: Mounts) -> None:
    """And the place where to make room."""
    point = mounts.in_memory("tmpfs", "small", "mode=755,size=1m")
    with target_in(point) as target:
        failure = refusals.refusal_of(lambda: space.check(target, 5 * MIB))
        assert failure is not None
        assert dict(failure.values) == {
            "path": f"{point}/new",
            "mount_point": str(point),
            "needed_bytes": str(5 * MIB),
            "free_bytes": str(space.free_bytes(target)),
        }


def test_file_system_that_reports_no_size_is_tried(mounts: Mounts) -> None:
    """Ramfs says 0 of everything."""
    with target_in(mounts.in_memory("ramfs", "ramfs")) as target:
        space.check(target, 2**60)


def test_errno_of_a_full_file_system_or_quota_becomes_its_condition(area: Path) -> None:
    """Any other is left to who asked."""
    with target_in(area) as target:
        for number, expected in (
            (errno.ENOSPC, "NO_SPACE"),
            (errno.EDQUOT, "QUOTA_EXCEEDED"),
            (errno.EIO, "done"),
        ):
            error = OSError(number, os.strerror(number))
            reason = refusals.reason_of(lambda error=error: space.raise_if_full(error, target))  # type: ignore[misc]
            assert reason == expected


@pytest.mark.parametrize(
    "name",
    ["plain", "with blank", "with\ttab", "with\nline", "with\\backslash", "with\\040both", "ünï"],
)
def test_mount_point_with_special_characters_is_named_correctly(mounts: Mounts, name: str) -> None:
    """The mount table escapes what would end a field."""
    point = mounts.in_memory("tmpfs", name)
    (point / "below").mkdir()
    for directory in (point, point / "below"):
        with target_in(directory) as target:
            assert space.mount_point(target) == str(point)


def test_mount_point_that_is_only_a_text_prefix_of_the_path_is_not_used(
    area: Path, mounts: Mounts
) -> None:
    """The longest that contains it counts."""
    mounts.in_memory("tmpfs", "image")
    (area / "images").mkdir()
    with target_in(area / "images") as target:
        assert str(area).startswith(space.mount_point(target))
