"""What the first and last bytes of an image say: by whatever bytes there may be."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convertd_core import values
from convertd_daemon.job.qemu import signatures

LOOSE: Final = frozenset({"bochs", "cloop"})
"""Never allowed, so that no more is asked of them than a few bytes."""

HEADS: Final[dict[bytes, str]] = {
    b"": "raw",
    b"QFI\xfb\0\0\0\0": "raw",
    b"QFI\xfb\0\0\0\1": "qcow",
    b"QFI\xfb\0\0\0\2": "qcow2",
    b"QFI\xfb\0\0\0\3": "qcow2",
    b"QFI\xfb\xff\xff\xff\xff": "qcow2",
    b"COWD": "vmdk",
    b"KDMV": "vmdk",
    b"VMDK": "raw",
    bytes(64) + b"\x7f\x10\xda\xbe": "vdi",
    bytes(63) + b"\x7f\x10\xda\xbe": "raw",
    b"conectix": "vpc",
    b"vhdxfile": "vhdx",
    b"QED\0": "qed",
    b"WithoutFreeSpace\2\0\0\0": "parallels",
    b"WithoutFreeSpace\3\0\0\0": "raw",
    b"WithouFreSpacExt\2\0\0\0": "parallels",
    b"LUKS\xba\xbe\0\1": "luks",
    b"LUKS\xba\xbe\0\2": "raw",
    b"version=1\n": "vmdk",
    b"version=2\r\n": "vmdk",
    b"version=4\n": "raw",
    b"# a\nversion=3\n": "vmdk",
    b"# a\r\nversion=1\r\n": "vmdk",
    b"# a\rb\nversion=1\n": "vmdk",
    b"# a\x0bb\nversion=1\n": "vmdk",
    b"#\n  \n \r\n#\nversion=1\n": "vmdk",
    b"#\n\nversion=1\n": "raw",
    b"#\n \x0b\nversion=1\n": "raw",
    b" version=1\n": "raw",
    b" \r\r\nversion=1\n": "raw",
    b"#" * 502 + b"\nversion=1\n": "raw",
    b"#" * 501 + b"\nversion=1\n": "vmdk",
    b"#!/bin/sh\n#V2.0 Format\n": "cloop",
    b"Bochs Virtual HD Image": "bochs",
}


def probed(path: Path, head: bytes) -> str | None:
    """What qemu's own probe takes a file for; None where the driver then fails."""
    path.write_bytes(head)
    argv = ["qemu-img", "info", "--output=json", str(path)]
    done = subprocess.run(argv, check=False, capture_output=True)
    return str(json.loads(done.stdout)["format"]) if done.returncode == 0 else None


def agrees(ours: str, theirs: str | None) -> bool:
    """Whether qemu's answer can be that of the driver that we would pick. Raw never fails."""
    return (
        ours == theirs or (theirs is None and ours != "raw") or (theirs == "raw" and ours in LOOSE)
    )


@pytest.mark.parametrize("head", HEADS)
def test_image_signature_selects_the_same_driver_as_qemu(tmp_path: Path, head: bytes) -> None:
    """Padded to any length."""
    ours = HEADS[head]
    assert signatures.driver_of(head) == ours
    for size in (0, 512, 4096):
        padded = head.ljust(size, b"\0")
        assert signatures.driver_of(padded) == ours
        assert agrees(ours, probed(tmp_path / "a", padded)), size


@pytest.mark.parametrize("seed", range(4))
def test_corrupted_image_signature_selects_the_same_driver_as_qemu(
    tmp_path: Path, seed: int
) -> None:
    """Bytes changed, taken away and put in."""
    chance = random.Random(seed)  # noqa: S311 - the same in each run
    for _ in range(40):
        head = bytearray(chance.choice(list(HEADS)).ljust(chance.choice((80, 512)), b"\0"))
        for _ in range(chance.randrange(3)):
            place = chance.randrange(min(len(head), 24))
            match chance.randrange(3):
                case 0:
                    head[place] = chance.choice((0, 1, 2, 10, 13, 32, 35, 255))
                case 1:
                    del head[place]
                case _:
                    head.insert(place, chance.choice((10, 32, 35)))
        found = signatures.driver_of(bytes(head))
        assert agrees(found, probed(tmp_path / "a", bytes(head))), bytes(head)


@given(st.binary(max_size=600), st.binary(max_size=600), st.binary(max_size=16), st.data())
def test_random_bytes_have_a_known_signature_or_none(
    head: bytes, tail: bytes, volume: bytes, data: st.DataObject
) -> None:
    """Nothing is raised, and what is found is one of a few."""
    magic = data.draw(st.sampled_from([*HEADS, b"BZh9", b"PK\3\4", b"koly", b"conectix"]))
    sample = signatures.Sample(
        head=magic + head, volume=volume, tail=magic + tail, trailer=magic + tail
    )
    driver = signatures.driver_of(sample.head)
    assert driver in values.FORMATS | LOOSE | {"qcow"}
    assert isinstance(signatures.second_self_of(driver, sample), str)
    found = signatures.container_of(sample)
    assert found is None or found.name
    assert signatures.vdi_type(sample.head) >= 0
    assert signatures.dmg_segments(sample.trailer) >= 0


@given(st.binary(min_size=512, max_size=512))
def test_random_sector_is_not_recognized_as_an_archive(head: bytes) -> None:
    """Only what was made to be one."""
    sample = signatures.Sample(head=b"\xfa" + head, tail=head, trailer=head)
    assert signatures.container_of(sample) is None


@given(st.binary(max_size=511))
def test_truncated_vhd_footer_is_not_recognized(rest: bytes) -> None:
    """But for the last byte, which old ones have not."""
    sector = (b"conectix" + rest)[:511]
    assert (signatures.vhd_footer(sector) is None) is (len(sector) < 511)
