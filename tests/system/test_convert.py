"""The main job: a user without rights asks, and an image is converted. With each of the clients."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from harness import images
from harness.callers import ALICE, Caller, Ran, owner_of
from harness.daemon import Daemon
from policies import IMAGES, Grant, Policy

POLICY: Final = Policy(
    grants=[
        Grant(
            read=[IMAGES],
            write=[IMAGES],
            formats=["raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx", "qed", "parallels"],
        )
    ]
)

SIZE_MIB: Final = int(os.environ.get("CONVERTD_TEST_IMAGE_MIB", "384"))
"""The size of the image of real files, mostly sparse: a quarter of it is files at most."""

CLIENTS: Final = ("convertctl", "python", "grpcurl")


def ask(client: str, daemon: Daemon, source: Path, dest: Path, caller: Caller = ALICE) -> Ran:
    """Convert with one of the clients. The formats are the suffixes of the names."""
    formats = [path.suffix.removeprefix(".") for path in (source, dest)]
    if client == "convertctl":
        options = ("-f", formats[0], "-O", formats[1])
        return caller.convertctl(daemon.socket, "convert", str(source), str(dest), *options)
    if client == "python":
        named = {"source_format": formats[0], "dest_format": formats[1]}
        return caller.client(daemon.socket, "convert", str(source), str(dest), **named)
    request = {
        "source": {"path": str(source), "format": formats[0]},
        "dest": {"path": str(dest), "format": formats[1]},
    }
    return caller.grpcurl(daemon.socket, "Convert", request)


@pytest.fixture(scope="module")
def large(scratch: Path, daemon: Daemon) -> Iterator[Path]:
    """A directory with an ext4 of real files in it, raw and as vmdk, both root's own."""
    assert daemon.is_running
    directory = scratch / "images" / "large"
    directory.mkdir()
    raw = images.file_system(directory / "disk.raw", SIZE_MIB, *images.real_files())
    images.converted(raw, directory / "disk.vmdk", "vmdk")
    yield directory
    for path in directory.iterdir():
        path.unlink()


@pytest.mark.parametrize("client", CLIENTS)
def test_conversion_raw_to_qcow2_to_raw_preserves_the_image_by(
    client: str, daemon: Daemon, large: Path, images_dir: Path
) -> None:
    """Its source is 0600 and another's. What is made is the caller's, and nobody else's."""
    there, back = images_dir / "there.qcow2", images_dir / "back.raw"
    for source, dest in ((large / "disk.raw", there), (there, back)):
        ran = ask(client, daemon, source, dest)
        assert ran.status == 0, ran
        assert owner_of(dest) == (ALICE.uid, ALICE.gid, 0o600)
        assert images.identical(large / "disk.raw", dest)
    there.unlink()
    back.unlink()


@pytest.mark.parametrize("client", CLIENTS)
def test_conversion_vmdk_to_raw_preserves_the_image_by(
    client: str, daemon: Daemon, large: Path, images_dir: Path
) -> None:
    """A vmdk is what a stranger's image most often is."""
    dest = images_dir / "disk.raw"
    ran = ask(client, daemon, large / "disk.vmdk", dest)
    assert ran.status == 0, ran
    assert owner_of(dest) == (ALICE.uid, ALICE.gid, 0o600)
    assert images.identical(large / "disk.raw", dest)
    dest.unlink()
