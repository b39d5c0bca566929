"""Every attack known to have worked on somebody: an image that has the converter read another file.

Each is tried with the image's format stated, unstated and stated wrong, by Convert and by Inspect,
and once with bare qemu-img, which falls for it: so that these tests can fail.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from harness.callers import ALICE
from harness.daemon import Daemon
from hostile import forged, secret, simple_calls
from hostile.forged import Qcow2
from hostile.secret import Secret
from policies import IMAGES, Grant, Policy, Root

OTHERS: Final = Root("others", "{scratch}/others")
POLICY: Final = Policy(
    grants=[
        Grant(
            read=[IMAGES],
            write=[IMAGES],
            formats=["raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx", "qed", "parallels"],
        ),
        Grant(users=[1235], read=[OTHERS], write=[OTHERS]),
    ]
)

WRONG: Final = {"qcow2": "vmdk", "vmdk": "qcow2", "qed": "vdi", "qcow": "qcow2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """An image of a format, made so that it names a file of a secret's directory.

    `falls` says whether this machine's bare qemu-img falls for it. `names` is given the directory.
    """

    format: str
    make: Callable[[Path], bytes]
    falls: bool = True


def qcow2_on(name: Callable[[Path], str], backing_format: str = "raw") -> Attack:
    """A qcow2 with a backing file."""
    return Attack(
        format="qcow2",
        make=lambda at: Qcow2(backing=name(at), backing_format=backing_format).data(),
    )


def qcow2_in(name: Callable[[Path], str], *, falls: bool = True) -> Attack:
    """A qcow2 whose data is in an external file."""
    return Attack(format="qcow2", make=lambda at: Qcow2(data_file=name(at)).data(), falls=falls)


def vmdk_in(name: Callable[[Path], str], kind: str = "monolithicFlat") -> Attack:
    """A VMDK descriptor with a flat extent."""
    return Attack(format="vmdk", make=lambda at: forged.flat_vmdk(name(at), kind=kind))


def raw_of(at: Path) -> str:
    """The plain name."""
    return f"{at}/disk.raw"


def climbing(at: Path) -> str:
    """A name that begins at the image's directory, {scratch}/images/test-N."""
    return f"../../{at.name}/disk.raw"


ATTACKS: Final[dict[str, Attack]] = {
    # Glance let an import name any file of the host as backing file.
    "CVE-2015-5163 backing file": qcow2_on(raw_of),
    "CVE-2015-5163 backing file of no stated format": qcow2_on(raw_of, backing_format=""),
    "CVE-2015-5163 backing file that is a qcow2": qcow2_on(lambda at: f"{at}/disk.qcow2", "qcow2"),
    # Nova took a snapshot of a raw disk into which its guest had written a header.
    "CVE-2015-7548 header on a raw disk": Attack(
        format="qcow2",
        make=lambda at: forged.on_a_raw_disk(Qcow2(backing=raw_of(at), backing_format="raw")),
    ),
    # Cinder, Glance and Nova read what a VMDK descriptor named.
    "CVE-2022-47951 flat extent": vmdk_in(raw_of),
    "CVE-2022-47951 flat extent, relative": vmdk_in(climbing),
    "CVE-2022-47951 vmfs extent": vmdk_in(raw_of, "vmfs"),
    "CVE-2022-47951 descriptor in a sparse file": Attack(
        format="vmdk",
        make=lambda at: forged.sparse_vmdk_with(forged.flat_vmdk(raw_of(at))),
    ),
    # The same services checked for backing files, and not for external data files.
    "CVE-2024-32498 data file": qcow2_in(raw_of),
    "CVE-2024-32498 data file, through proc": qcow2_in(lambda at: f"/proc/self/root{raw_of(at)}"),
    # They then checked what the image said it was, and not what qemu-img would make of it.
    "CVE-2024-40767 data file, on a raw disk": Attack(
        format="qcow2", make=lambda at: forged.on_a_raw_disk(Qcow2(data_file=raw_of(at)))
    ),
    "CVE-2024-40767 flat extent, padded to a disk": Attack(
        format="vmdk", make=lambda at: forged.flat_vmdk(raw_of(at)).ljust(16 * 1024, b"\n")
    ),
    # qemu-img itself opened a data file whose name was one of its pseudo names. It is mended in
    # what distributions have now, so only an old one falls for it.
    "CVE-2024-4467 data file in json": qcow2_in(lambda at: secret.as_json(raw_of(at)), falls=False),
    "CVE-2024-4467 data file by nbd": qcow2_in(lambda at: f"nbd:unix:{at}/nbd", falls=False),
    # Not everybody's CVE, and the same thing.
    "backing file, relative": qcow2_on(climbing),
    "backing file, through proc": qcow2_on(lambda at: f"/proc/self/root{raw_of(at)}"),
    "backing file, in json": qcow2_on(lambda at: secret.as_json(raw_of(at)), ""),
    "backing file, by file:": qcow2_on(lambda at: f"file:{raw_of(at)}"),
    "backing file, by nbd:": qcow2_on(lambda at: f"nbd:unix:{at}/nbd"),
    "backing file, by nbd+unix:": qcow2_on(lambda at: f"nbd+unix:///?socket={at}/nbd"),
    "backing file of a QED": Attack(
        format="qed",
        make=lambda at: forged.overlay(at.parent / "overlay", "qed", at / "disk.raw", "raw"),
    ),
    "backing file of a qcow, version 1": Attack(
        format="qcow",
        make=lambda at: forged.overlay(at.parent / "overlay", "qcow", at / "disk.raw", "raw"),
    ),
    "parent of a VMDK": Attack(
        format="vmdk",
        make=lambda at: forged.overlay(at.parent / "overlay", "vmdk", at / "disk.vmdk", "vmdk"),
    ),
}


@pytest.fixture(params=ATTACKS.values(), ids=tuple(ATTACKS))
def attack(request: pytest.FixtureRequest) -> Attack:
    """One of them."""
    one: Attack = request.param
    return one


@pytest.fixture
def forge(attack: Attack, secret: Secret, images_dir: Path) -> tuple[Path, Path]:
    """The image that names the secret; and one that names what isn't there, and else is equal."""
    data = attack.make(secret.directory)
    twin = data.replace(secret.directory.name.encode(), secret.absent.name.encode())
    assert twin != data
    named = simple_calls.file_of(ALICE, images_dir / "a.img", data)
    return named, simple_calls.file_of(ALICE, images_dir / "b.img", twin)


def test_control_bare_qemu_img_is_vulnerable_to(
    attack: Attack, forge: tuple[Path, Path], secret: Secret
) -> None:
    """As root, which is how it was run where it did the damage."""
    out = forge[0].with_suffix(".out")
    argv = ["qemu-img", "convert", "-f", attack.format, "-O", "raw", str(forge[0]), str(out)]
    subprocess.run(argv, check=False, capture_output=True)
    assert simple_calls.contains(out, secret.marker) is attack.falls


@pytest.mark.parametrize("stated", ["right", "unstated", "raw", "wrong"])
def test_convertd_is_not_vulnerable_to(
    daemon: Daemon, attack: Attack, forge: tuple[Path, Path], secret: Secret, stated: str
) -> None:
    """And tells nobody whether the file that was named exists: neither by Convert nor by Inspect.

    Stated as raw it is a copy of the image's own bytes, which is what raw means. A format that a
    policy can't allow is refused as such.
    """
    named, twin = forge
    formats = {"right": attack.format, "unstated": "", "raw": "raw", "wrong": WRONG[attack.format]}
    out = named.with_suffix(".raw")
    answers = []
    for image in (named, twin):
        converted = simple_calls.convert(daemon, image, out, formats[stated])
        assert not simple_calls.contains(out, secret.marker)
        inspected = simple_calls.inspect(daemon, image, formats[stated])
        assert secret.marker not in converted.received + inspected.received
        assert converted.is_ok is (stated == "raw")
        answers.append((converted, inspected))
        out.unlink(missing_ok=True)
    assert [(answer.status, answer.reason, answer.message) for answer in answers[0]] == [
        (other.status, other.reason, other.message)
        for other in (
            answer.with_name(str(twin), str(named)).with_name(
                secret.absent.name, secret.directory.name
            )
            for answer in answers[1]
        )
    ]
    assert sorted(os.listdir(named.parent)) == ["a.img", "b.img"]
