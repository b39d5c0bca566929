"""Why qemu-img does not open an image: told in fixed words, and never in those of an image."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import Final

import grants
import pytest
import whole_job

from convertd_core import values
from convertd_daemon.job.qemu import reasons

PATH: Final = "/proc/self/fd/7"

REPLAY: Final = (
    f"qemu-img: Could not open '{PATH}': VHDX image file '{PATH}' opened read-only, but contains "
    f"a log that needs to be replayed\nTo replay the log, run:\nqemu-img check -r all '{PATH}'\n"
)


def changed(path: Path, image_format: str, offset: int, data: bytes) -> Path:
    """An image of which some bytes are others."""
    subprocess.run(["qemu-img", "create", "-q", "-f", image_format, str(path), "1M"], check=True)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return path


BAD: Final[dict[str, tuple[str, int, bytes, str]]] = {
    "qcow2 feature": ("qcow2", 72, struct.pack(">Q", 1 << 40), "features that this qemu-img"),
    "qcow2 version": ("qcow2", 4, struct.pack(">I", 9), "a version that this qemu-img"),
    "qed feature": ("qed", 16, struct.pack("<Q", 1 << 62), "features that this qemu-img"),
    "vdi link": ("vdi", 0x1A8, b"x" * 16, "its data may be in other files"),
    "vdi parent": ("vdi", 0x1B8, b"x" * 16, "its data may be in other files"),
    "vdi version": ("vdi", 0x44, struct.pack("<I", 0x10009), "a version that this qemu-img"),
}


@pytest.mark.parametrize("kind", BAD)
def test_image_open_failure_of_qemu_img_is_reported_with_its_reason(area: Path, kind: str) -> None:
    """As far as that names no file."""
    image_format, offset, data, words = BAD[kind]
    source = changed(area / "in", image_format, offset, data)
    request = grants.request(source, area / "out", image_format)
    outcome = whole_job.run(grants.Rules(roots=(grants.files(area),)).convert(request))
    assert outcome.reason == "IMAGE_REFUSED"
    assert outcome.failure is not None
    assert words in outcome.failure.message


def test_image_with_an_unreplayed_log_is_reported_as_such() -> None:
    """Its own hint names a descriptor of its own."""
    said = reasons.of_opening(REPLAY, PATH)
    assert said == "its log must be replayed first, by a user who may write it"


OPENING: Final = f"qemu-img: Could not open '{PATH}': "

FORGED: Final = {
    "of a name": f"{OPENING}Could not open '/etc/shadow': Not a directory",
    "of another image": "qemu-img: Could not open '/etc/shadow': Unsupported qcow2 version 9",
    "behind a reason": f"{REPLAY}'/etc/shadow'",
    "in a reason": f"{OPENING}Unsupported image type '/etc/shadow'",
    "on another line": f"{OPENING}Unsupported qcow2 feature(s): a\n/etc/shadow",
}


@pytest.mark.parametrize("forged", FORGED)
def test_error_message_that_names_another_file_is_not_passed_on(forged: str) -> None:
    """Whether it exists is nobody's affair; and what we say is never a part of it."""
    assert reasons.of_opening(FORGED[forged], PATH) is None


def test_feature_name_from_the_image_is_not_passed_on() -> None:
    """The image chose it."""
    said = reasons.of_opening(
        f"qemu-img: Could not open '{PATH}': Unsupported qcow2 feature(s): /etc/shadow", PATH
    )
    assert said == "it has features that this qemu-img does not know"


def test_qemu_img_output_is_shown_to_local_callers_only() -> None:
    """To all others it would tell which files there are."""
    own = values.Place(root=values.Root(name="own", path="/", access=None), below="images/in")
    root = grants.files("/images")
    other = values.Place(root=root, below="in")
    assert reasons.unknown("first\nqemu-img: strange", own) == "it said 'qemu-img: strange'"
    assert reasons.unknown("qemu-img: strange", other) == reasons.IN_THE_LOG


@pytest.mark.parametrize("name", ["bzip2", "lzfse"])
def test_missing_qemu_module_is_named(name: str) -> None:
    """As qemu-img warns of it, before it fails to read."""
    said = (
        f"qemu-img: warning: dmg-{name} module is missing, accessing {name} compressed blocks "
        "will result in errors\nqemu-img: error while reading at byte 0: Input/output error"
    )
    assert reasons.missing_module(said) == name
