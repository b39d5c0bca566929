"""What a guest wrote to its volume, converted from there; and what lies on a volume written to.

CVE-2026-24708: a guest wrote a header onto its raw disk, and a qemu-img that was not told the
format went on to resize, and so to destroy, the file of the host that the header named.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from harness.agent import conversion
from harness.callers import ALICE
from harness.daemon import Daemon
from hostile import forged, simple_calls
from hostile.forged import Qcow2
from hostile.secret import Secret
from loop_devices import Devices
from policies import IMAGES, VOLUMES, Grant, Policy

POLICY: Final = Policy(
    grants=[
        Grant(read=[IMAGES, VOLUMES], write=[IMAGES, VOLUMES], formats=["raw", "qcow2", "vmdk"])
    ]
)

MIB: Final = 1024 * 1024

HEADERS: Final[dict[str, Callable[[str], bytes]]] = {
    "backing file": lambda name: Qcow2(backing=name, backing_format="raw").data(),
    "data file": lambda name: Qcow2(data_file=name).data(),
    "flat extent": forged.flat_vmdk,
}


@pytest.fixture(params=HEADERS.values(), ids=tuple(HEADERS))
def volume(request: pytest.FixtureRequest, volumes: Devices, secret: Secret) -> tuple[Path, bytes]:
    """A volume on which a guest wrote a header that names the secret; and that header."""
    header: bytes = request.param(str(secret.raw))
    link = volumes.add(f"volume-{len(os.listdir(volumes.links))}", 4 * MIB)
    with link.open("r+b") as device:
        device.write(header)
    return link, header


def test_control_bare_qemu_img_writes_to_the_file_named_in_a_header(
    secret: Secret, scratch: Path
) -> None:
    """The control for what is written: it resizes the victim, here a copy."""
    victim, image = scratch / "victim", scratch / "guest.raw"
    shutil.copy(secret.raw, victim)
    image.write_bytes(Qcow2(data_file=str(victim)).data())
    subprocess.run(["qemu-img", "resize", "-q", str(image), "1M"], check=True)
    assert victim.stat().st_size == MIB
    victim.unlink()


def test_control_bare_qemu_img_reads_the_file_named_on_a_volume(
    volume: tuple[Path, bytes], secret: Secret, scratch: Path
) -> None:
    """The control for what is read."""
    out = scratch / "bare.raw"
    argv = ["qemu-img", "convert", "-O", "raw", str(volume[0]), str(out)]
    subprocess.run(argv, check=False, capture_output=True)
    assert simple_calls.contains(out, secret.marker)
    out.unlink(missing_ok=True)


@pytest.mark.parametrize("stated", ["raw", "qcow2", "vmdk", ""])
def test_volume_with_an_image_header_is_read_as_stated_or_refused(
    daemon: Daemon, volume: tuple[Path, bytes], secret: Secret, images_dir: Path, stated: str
) -> None:
    """Stated as raw it is copied, its header too. Else it would be what the header says."""
    os.chown(images_dir, ALICE.uid, ALICE.gid)
    link, header = volume
    out = images_dir / "out.raw"
    answer = simple_calls.convert(daemon, link, out, stated)
    assert (
        secret.marker not in answer.received + simple_calls.inspect(daemon, link, stated).received
    )
    assert not simple_calls.contains(out, secret.marker)
    if stated == "raw":
        assert out.read_bytes().startswith(header)
    assert secret.unchanged()


def test_writing_to_a_volume_with_an_image_header_changes_no_other_file(
    daemon: Daemon, volume: tuple[Path, bytes], secret: Secret, images_dir: Path, volumes: Devices
) -> None:
    """The destination is raw, whatever was on it."""
    link, _ = volume
    content = os.urandom(2 * MIB)
    image = simple_calls.file_of(ALICE, images_dir / "image.raw", content)
    request = conversion(image, link, dest_format="raw")
    assert simple_calls.outcome_of(daemon.agent(ALICE).convert(request)).is_ok
    assert volumes.bytes_on(link) == content + bytes(2 * MIB)
    assert secret.unchanged()


def test_existing_destination_with_an_image_header_is_replaced_unopened(
    daemon: Daemon, secret: Secret, images_dir: Path
) -> None:
    """Nothing that bears the destination's name is ever given to qemu-img."""
    os.chown(images_dir, ALICE.uid, ALICE.gid)
    old = simple_calls.file_of(ALICE, images_dir / "out", Qcow2(data_file=str(secret.raw)).data())
    image = simple_calls.file_of(ALICE, images_dir / "image.raw", os.urandom(MIB))
    for dest_format in ("raw", "qcow2"):
        request = conversion(image, old, dest_format=dest_format, overwrite=True)
        assert simple_calls.outcome_of(daemon.agent(ALICE).convert(request)).is_ok
    assert secret.unchanged()
