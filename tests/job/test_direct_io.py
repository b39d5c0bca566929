"""Whether an inode takes direct I/O: by the kernel's word, or by doing it, where it does or not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from descriptors import none_left_open
from harness.mounts import Mounts

from convertd_daemon.job.files import direct_io
from convertd_daemon.linux import statx


@pytest.fixture
def on_ramfs(mounts: Mounts) -> Iterator[int]:
    """An empty inode on the file system that takes none."""
    point = mounts.in_memory("ramfs", "ramfs")
    descriptor = os.open(point / "file", os.O_CREAT | os.O_RDWR, 0o600)
    yield descriptor
    os.close(descriptor)


@pytest.fixture(params=["told", "tried"])
def unnamed(
    request: pytest.FixtureRequest, area: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[int]:
    """An empty inode on a file system that takes direct I/O, whether or not that says so."""
    if request.param == "tried":
        monkeypatch.setattr(statx, "direct_alignment", lambda _: None)
    descriptor = os.open(area, os.O_TMPFILE | os.O_RDWR, 0o600)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 1024 * 1024])
def test_direct_read_is_possible_for_a_file_of_any_size(unnamed: int, size: int) -> None:
    """And its content is not changed by asking."""
    data = os.urandom(size)
    os.write(unnamed, data)
    assert direct_io.read_refusal(unnamed) is None
    assert os.pread(unnamed, size + 1, 0) == data


def test_direct_write_test_leaves_the_file_empty(unnamed: int) -> None:
    """A leftover block would end up in the result."""
    assert direct_io.write_refusal(unnamed) is None
    assert os.fstat(unnamed).st_size == 0


def test_direct_io_reported_by_the_kernel_is_not_tested(mounts: Mounts) -> None:
    """It would take the disk milliseconds."""
    descriptor = os.open(mounts.on_a_loop("xfs", "xfs"), os.O_TMPFILE | os.O_RDWR, 0o600)
    before = os.fstat(descriptor)
    assert direct_io.write_refusal(descriptor) is None
    assert os.fstat(descriptor) == before
    os.close(descriptor)


@pytest.mark.parametrize(("memory", "offset"), [(0, 0), (512, 8192), (8192, 512), (4096, 0)])
def test_direct_io_with_unsuitable_alignment_is_tested(
    on_ramfs: int, monkeypatch: pytest.MonkeyPatch, memory: int, offset: int
) -> None:
    """Blocks of 4096 bytes are what qemu transfers at least."""
    told = statx.DirectAlignment(memory=memory, offset=offset)
    monkeypatch.setattr(statx, "direct_alignment", lambda _: told)
    assert direct_io.read_refusal(on_ramfs) == "Invalid argument"
    assert direct_io.write_refusal(on_ramfs) == "Invalid argument"


def test_direct_io_refusal_has_the_kernel_message(on_ramfs: int) -> None:
    """Ramfs refuses O_DIRECT when it is opened."""
    assert direct_io.read_refusal(on_ramfs) == "Invalid argument"
    assert direct_io.write_refusal(on_ramfs) == "Invalid argument"


def test_direct_write_that_fails_after_open_is_a_refusal_too(mounts: Mounts) -> None:
    """Here the file system is full, which is seen at the first transfer only."""
    point = mounts.in_memory("tmpfs", "full", "mode=755,size=64k")
    with (point / "filler").open("wb", buffering=0) as filler:
        filler.write(bytes(65536))
    descriptor = os.open(point / "file", os.O_CREAT | os.O_RDWR, 0o600)
    assert direct_io.write_refusal(descriptor) == "No space left on device"
    assert os.fstat(descriptor).st_size == 0
    os.close(descriptor)


def test_direct_write_test_on_a_file_with_data_is_an_error(unnamed: int) -> None:
    """It would lose what it holds; to ask is a mistake of ours."""
    os.write(unnamed, b"data")
    with pytest.raises(ValueError, match="holds data"):
        direct_io.write_refusal(unnamed)
    assert os.pread(unnamed, 9, 0) == b"data"


def test_direct_io_test_leaves_no_descriptor_open(unnamed: int, on_ramfs: int) -> None:
    """Whatever the answer was."""
    with none_left_open():
        for descriptor in (unnamed, on_ramfs):
            direct_io.write_refusal(descriptor)
            direct_io.read_refusal(descriptor)
