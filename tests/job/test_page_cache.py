"""Whether an image is in the page cache, on files that are, are not, and partly are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import children
import pytest

from convertd_daemon.job.files import page_cache

MIB: Final = 1024 * 1024


@pytest.fixture
def image(area: Path) -> Iterator[int]:
    """A file of 64 MiB, of which the second half is data, in memory and on the disk."""
    path = area / "image"
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    os.pwrite(descriptor, os.urandom(32 * MIB), 32 * MIB)
    os.fsync(descriptor)
    yield descriptor
    os.close(descriptor)


def forget(descriptor: int, offset: int = 0, length: int = 0) -> None:
    """Have the kernel drop clean pages. Source: posix_fadvise(2)."""
    os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


def test_written_file_is_in_the_page_cache(image: int) -> None:
    """Holes are passed over: reading them takes nothing."""
    assert page_cache.is_in_memory(image)


def test_dropped_file_is_not_in_the_page_cache(image: int) -> None:
    """Until somebody reads it."""
    forget(image)
    assert not page_cache.is_in_memory(image)
    assert len(os.pread(image, 32 * MIB, 32 * MIB)) == 32 * MIB
    assert page_cache.is_in_memory(image)


@pytest.mark.parametrize("begin_mib", [32, 40, 48, 56])
def test_file_with_a_quarter_missing_is_not_in_the_page_cache(image: int, begin_mib: int) -> None:
    """Wherever it is: it would be read into memory that belongs to others."""
    forget(image, begin_mib * MIB, 8 * MIB)
    assert not page_cache.is_in_memory(image)


@pytest.mark.parametrize("size", [1, 4095, 4097, 3 * MIB])
def test_page_cache_query_accepts_any_file_size(area: Path, size: int) -> None:
    """Also that of less than a page, and of one that is no multiple of it."""
    path = area / "small"
    path.write_bytes(os.urandom(size))
    with path.open("rb") as file:
        assert page_cache.is_in_memory(file.fileno())


def test_holes_between_data_count_as_in_the_page_cache(area: Path) -> None:
    """As in the image of a file system, in which data and holes take turns."""
    with (area / "holes").open("w+b") as file:
        for number in range(256):
            file.seek(number * 128 * 1024)
            file.write(b"x" * 8192)
        file.flush()
        os.fsync(file.fileno())
        assert page_cache.is_in_memory(file.fileno())
        forget(file.fileno())
        assert not page_cache.is_in_memory(file.fileno())


def test_object_without_data_is_not_in_the_page_cache(area: Path) -> None:
    """An empty file, one that is a hole, and a device."""
    (area / "empty").touch()
    with (area / "hole").open("wb") as file:
        file.truncate(MIB)
    for path in (area / "empty", area / "hole", Path("/dev/null")):
        with path.open("rb") as file:
            assert not page_cache.is_in_memory(file.fileno())


def test_page_cache_of_another_users_file_is_known_to_root_only(image: int) -> None:
    """The kernel would say that all of it is in memory."""
    forget(image)

    def ask() -> list[bool]:
        as_root = page_cache.is_in_memory(image)
        os.setresuid(1234, 1234, 1234)
        return [as_root, page_cache.is_in_memory(image)]

    assert children.in_child(ask) == [False, False]
