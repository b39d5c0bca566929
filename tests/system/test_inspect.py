"""What Inspect tells of an image, field by field, as the contract has it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from harness import images, waiting
from harness.agent import Agent
from harness.callers import ALICE
from harness.daemon import Daemon
from policies import IMAGES, Grant, Policy

from convertd.v1 import convert_pb2 as pb
from convertd_daemon.job.files import paths
from convertd_daemon.linux import locks

POLICY: Final = Policy(
    grants=[Grant(read=[IMAGES], write=[IMAGES], formats=["raw", "qcow2", "vmdk"])]
)


@pytest.fixture
def alice(daemon: Daemon) -> Agent:
    """Whoever may read the images."""
    return daemon.agent(ALICE)


def inspected(agent: Agent, path: Path) -> pb.InspectResponse:
    """What the daemon says of an image."""
    request = pb.InspectRequest(source=pb.Source(path=str(path)))
    return agent.ask("Inspect", request, pb.InspectResponse)


def qemu_img(*arguments: object) -> None:
    """Run the system's own."""
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def test_inspect_reports_all_fields_of_a_snapshot(alice: Agent, images_dir: Path) -> None:
    """Each has an id, a name, and the moment at which it was taken."""
    path = images.created(images_dir / "a.qcow2", "qcow2", 4)
    before_s = int(time.time())
    qemu_img("snapshot", "-c", "first", path)
    qemu_img("snapshot", "-c", "second, \N{SNOWMAN}", path)
    after_s = int(time.time())
    told = inspected(alice, path).snapshots
    assert [(item.id, item.name) for item in told] == [("1", "first"), ("2", "second, \N{SNOWMAN}")]
    for item in told:
        assert before_s <= item.create_time.seconds <= after_s
        assert (item.vm_state_size_bytes, item.vm_clock_seconds) == (0, 0)


def test_inspect_reports_the_vm_state_of_a_snapshot(alice: Agent, images_dir: Path) -> None:
    """Its size, and how long it had run: written into the image as a running qemu would have."""
    path = images.created(images_dir / "a.qcow2", "qcow2", 4)
    qemu_img("snapshot", "-c", "mark", path)
    data = bytearray(path.read_bytes())
    # Source: qemu docs/interop/qcow2.txt, "Snapshots".
    entry = int.from_bytes(data[64:72], "big")
    assert data[entry + 12 + 28 :].index(b"mark") < 64
    data[entry + 24 : entry + 32] = (90_500_000_000).to_bytes(8, "big")
    data[entry + 40 : entry + 48] = (123_456).to_bytes(8, "big")
    path.write_bytes(data)
    (told,) = inspected(alice, path).snapshots
    assert (told.vm_state_size_bytes, told.vm_clock_seconds) == (123_456, 90.5)


def test_inspect_reports_granularity_and_flags_of_a_bitmap(alice: Agent, images_dir: Path) -> None:
    """One that is recorded, and one that is not."""
    path = images.created(images_dir / "a.qcow2", "qcow2", 4)
    qemu_img("bitmap", "--add", "-g", "128k", path, "on")
    qemu_img("bitmap", "--add", "--disable", path, "off")
    told = {item.name: item for item in inspected(alice, path).bitmaps}
    assert (told["on"].granularity_bytes, list(told["on"].flags)) == (128 << 10, ["auto"])
    assert (told["off"].granularity_bytes, list(told["off"].flags)) == (64 << 10, [])


@pytest.mark.parametrize(
    ("subformat", "is_compressed"), [("streamOptimized", True), ("monolithicSparse", False)]
)
def test_inspect_reports_whether_a_vmdk_is_compressed(
    alice: Agent, images_dir: Path, subformat: str, *, is_compressed: bool
) -> None:
    """Its header does."""
    source = images.small(images_dir / "a.raw")
    path = images_dir / "a.vmdk"
    qemu_img("convert", "-O", "vmdk", "-o", f"subformat={subformat}", source, path)
    assert inspected(alice, path).compressed is is_compressed


@contextlib.contextmanager
def opened_by_a_qemu(path: Path, *options: str) -> Iterator[None]:
    """Have a qemu hold the image, as a machine does whose disk it is."""
    argv = ["qemu-io", *options, "-f", "qcow2", str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as holder:
        fd = os.open(path, os.O_RDONLY)
        try:
            waiting.until(
                lambda: locks.is_locked(fd, *paths.QEMU_LOCKS), "qemu has locked the image"
            )
            yield
        finally:
            os.close(fd)
            holder.communicate(b"quit\n")


def test_inspect_of_an_image_open_for_writing_has_a_warning(alice: Agent, images_dir: Path) -> None:
    """What it is may change while it is told. One that others only read stays as it is."""
    path = images.created(images_dir / "a.qcow2", "qcow2", 4)
    with opened_by_a_qemu(path):
        assert [item.reason for item in inspected(alice, path).warnings] == ["IMAGE_IN_USE"]
    with opened_by_a_qemu(path, "-r"):
        assert list(inspected(alice, path).warnings) == []
    assert list(inspected(alice, path).warnings) == []


@pytest.mark.parametrize("backing", ["absent", "/etc/passwd", "/etc/absent"])
def test_inspect_of_a_broken_chain_reports_the_reason(
    alice: Agent, images_dir: Path, backing: str
) -> None:
    """The one that a conversion fails with; of what may not be read it is always the same."""
    path = images_dir / "a.qcow2"
    qemu_img("create", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", path, "1M")
    told = inspected(alice, path)
    assert (told.backing_filename, told.backing_chain_complete) == (backing, False)
    (warning,) = told.warnings
    assert warning.reason == "BACKING_REFUSED"
    assert warning.message.startswith(f"{path}: its backing file '{backing}' is refused: ")
    is_outside = backing.startswith("/etc")
    assert warning.message.endswith("it is not below a root that you may read") is is_outside
