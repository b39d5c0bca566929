"""A compromised qemu-img, as the job sees it. What it may do: tests/kernel.

It runs where the real one was when the daemon started: each job opens the program anew.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from harness.agent import conversion
from harness.callers import ALICE, BOB
from harness.daemon import Daemon
from harness.fixtures import FillPolicy
from hostile import program, simple_calls
from hostile.program import Behaviour
from hostile.secret import Secret
from policies import IMAGES, Grant, Policy

from convertd.v1 import convert_pb2 as pb

POLICY: Final = Policy(
    limits={"duration": "1 h"},
    qemu_img="{scratch}/program/qemu-img",
    grants=[Grant(read=[IMAGES], write=[IMAGES], formats=["raw", "qcow2", "vdi"])],
)

pytestmark = pytest.mark.skipif(
    not program.fits(), reason=f"needs {program.MACHINE}, this is {platform.machine()}"
)

HONEST: Final = {
    "virtual-size": 65536,
    "filename": "/proc/self/fd/4",
    "format": "qcow2",
    "actual-size": 4096,
}

FORGED: Final = b"\nINFO convertd.audit[1] operation=convert outcome=done uid=0\n"


@pytest.fixture(scope="module")
def place(scratch: Path) -> Path:
    """Where the daemon looks for qemu-img. It is the real one, when the daemon starts."""
    directory = scratch / "program"
    directory.mkdir()
    path = directory / "qemu-img"
    shutil.copy("/usr/bin/qemu-img", path)
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def attacked(place: Path, fill_in: FillPolicy) -> Iterator[Daemon]:
    """A daemon that has started."""
    assert place.exists()
    one = Daemon(fill_in(POLICY))
    one.start()
    yield one
    one.await_idle()
    one.discard()


@pytest.fixture
def image(images_dir: Path) -> Path:
    """An image of Alice's, which begins so that qemu-img is asked about a qcow2."""
    os.chown(images_dir, ALICE.uid, ALICE.gid)
    data = b"QFI\xfb\0\0\0\3".ljust(65536, b"x")
    return simple_calls.file_of(ALICE, images_dir / "image.qcow2", data)


def said(**changes: Any) -> Behaviour:  # noqa: ANN401 - whatever JSON has
    """What `info` says: an honest answer with a lie in it."""
    return Behaviour(out=json.dumps({**HONEST, **changes}).encode())


LIES: Final[dict[str, tuple[Behaviour, str]]] = {
    "a backing file outside": (said(**{"backing-filename": "/etc/shadow"}), "BACKING_REFUSED"),
    "a backing file that is a protocol": (
        said(**{"backing-filename": "nbd:unix:/run/x"}),
        "BACKING_REFUSED",
    ),
    "a format that nobody allowed": (said(format="vmdk"), "FORMAT_MISMATCH"),
    "a format that there is not": (said(format="nbd"), "FORMAT_MISMATCH"),
    "a format that is no text": (said(format=["qcow2"]), "FORMAT_MISMATCH"),
    "a negative size": (said(**{"virtual-size": -1}), "IMAGE_REFUSED"),
    "a size without end": (said(**{"virtual-size": 10**400}), "IMAGE_REFUSED"),
    "an infinite size": (Behaviour(out=b'{"virtual-size": 1e999}'), "IMAGE_REFUSED"),
    "a size that is a text": (said(**{"virtual-size": "65536"}), "IMAGE_REFUSED"),
    "more than allowed": (said(**{"virtual-size": 2**50}), "IMAGE_TOO_LARGE"),
    "a list": (Behaviour(out=b"[]"), "IMAGE_REFUSED"),
    "a number": (Behaviour(out=b"1"), "IMAGE_REFUSED"),
    "nothing": (Behaviour(), "IMAGE_REFUSED"),
    "no JSON": (Behaviour(out=b"\xff{"), "IMAGE_REFUSED"),
    "brackets without end": (Behaviour(out=b"[" * 500_000), "IMAGE_REFUSED"),
    "braces without end": (Behaviour(out=b'{"a":' * 200_000), "IMAGE_REFUSED"),
    "details that are a text": (said(**{"format-specific": "x"}), "IMAGE_REFUSED"),
    "snapshots that are numbers": (said(snapshots=[1, 2]), "IMAGE_REFUSED"),
    "another file": (
        said(**{"format-specific": {"data": {"extents": [{"filename": "/etc/shadow"}]}}}),
        "IMAGE_REFUSED",
    ),
    # It is not in what is told of a conversion, which goes on.
    "a text that is too long": (said(snapshots=[{"name": "n" * 900_000}]), "CONVERSION_FAILED"),
    "more than anybody reads": (said(snapshots=[{"name": "n" * 3_000_000}]), "IMAGE_REFUSED"),
    "half a character": (Behaviour(out=b'{"format": "\\ud800"}'), "IMAGE_REFUSED"),
    "half a character in a name": (said(snapshots=[{"name": "\ud800"}]), "IMAGE_REFUSED"),
    "a failure": (Behaviour(err=FORGED, status=1), "IMAGE_REFUSED"),
    "a failure as of another format": (
        Behaviour(
            err=b"qemu-img: Could not open '/proc/self/fd/4': Image is not in qcow2 format",
            status=1,
        ),
        "IMAGE_REFUSED",
    ),
    "no end": (Behaviour(hangs=True), "DURATION_EXCEEDED"),
    "no end of words": (Behaviour(out=b"a" * 4096, repeats=True), "DURATION_EXCEEDED"),
    "no end of complaints": (Behaviour(err=b"a\n" * 2048, repeats=True), "DURATION_EXCEEDED"),
}


LIMITS: Final = {"DURATION_EXCEEDED": {"duration": "2 s"}}
"""What the policy says while a test is about it."""


@pytest.mark.parametrize("name", LIES)
def test_compromised_qemu_img_report_about_an_image_is_validated(
    attacked: Daemon, place: Path, image: Path, name: str
) -> None:
    """It can say what it likes. The answer is a condition, never a bug, and no file opens."""
    info, expected = LIES[name]
    program.write(place, info=info, otherwise=Behaviour(status=1))
    out = image.with_suffix(".raw")
    with attacked.limited(**LIMITS.get(expected, {})):
        assert simple_calls.convert(attacked, image, out, "").reason == expected
    assert not out.exists()
    assert attacked.agent(BOB).access().uid == BOB.uid


def snapshot(**changes: object) -> dict[str, object]:
    """One that there might be, with a lie in it."""
    times = dict.fromkeys(("date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec"), 0)
    return {"id": "1", "name": "s", "vm-state-size": 0, **times, **changes}


def bitmap(**changes: object) -> dict[str, object]:
    """One that there might be, with a lie in it."""
    honest = {"name": "b", "granularity": 65536, "flags": [], **changes}
    return {"type": "qcow2", "data": {"bitmaps": [honest]}}


CONTENTS: Final[dict[str, tuple[Behaviour, str]]] = {
    "what there might be": (said(snapshots=[snapshot()], **{"format-specific": bitmap()}), "OK"),
    "a state of less than nothing": (
        said(snapshots=[snapshot(**{"vm-state-size": -1})]),
        "IMAGE_REFUSED",
    ),
    "a state without end": (
        said(snapshots=[snapshot(**{"vm-state-size": 10**400})]),
        "IMAGE_REFUSED",
    ),
    "a time after all time": (
        said(snapshots=[snapshot(**{"date-sec": 2**62})]),
        "IMAGE_REFUSED",
    ),
    "a time before all time": (
        said(snapshots=[snapshot(**{"date-nsec": -(2**62)})]),
        "IMAGE_REFUSED",
    ),
    "an id that is a number": (said(snapshots=[snapshot(id=1)]), "IMAGE_REFUSED"),
    "a name that is too long": (said(snapshots=[snapshot(name="n" * 900_000)]), "UNSUPPORTED"),
    "half a snapshot": (said(snapshots=[{"name": "s"}]), "IMAGE_REFUSED"),
    "bits of less than nothing": (
        said(**{"format-specific": bitmap(granularity=-1)}),
        "IMAGE_REFUSED",
    ),
    "flags that are numbers": (said(**{"format-specific": bitmap(flags=[1])}), "IMAGE_REFUSED"),
    "flags without end": (
        said(**{"format-specific": bitmap(flags=["auto"] * 50_000)}),
        "UNSUPPORTED",
    ),
}


@pytest.mark.parametrize(("info", "expected"), CONTENTS.values(), ids=tuple(CONTENTS))
def test_compromised_qemu_img_list_of_snapshots_and_bitmaps_is_validated(
    attacked: Daemon, place: Path, image: Path, info: Behaviour, expected: str
) -> None:
    """Snapshots and bitmaps are told by Inspect alone: as they can be, or not at all."""
    program.write(place, info=info, otherwise=Behaviour(status=1))
    answer = simple_calls.inspect(attacked, image, "")
    assert (answer.reason or answer.status) == expected
    assert attacked.agent(BOB).access().uid == BOB.uid


ENDS: Final[dict[str, tuple[Behaviour, str]]] = {
    "success, and nothing written": (Behaviour(), "VERIFY_FAILED"),
    "progress of a madman": (
        Behaviour(out=b"    (999.99/100%)\r(1e9/100%)\r(\xff/100%)\r(100.00/100%)\r" * 1000),
        "VERIFY_FAILED",
    ),
    "one line without end": (Behaviour(out=b"(" * 1_000_000), "VERIFY_FAILED"),
    "complaints": (Behaviour(err=b"a warning\n" * 100_000), "VERIFY_FAILED"),
    "a failure in words of a log": (Behaviour(err=FORGED, status=1), "CONVERSION_FAILED"),
    "a failure that tells of a file": (
        Behaviour(err=b"error while reading '/etc/shadow': Permission denied", status=1),
        "READ_FAILED",
    ),
    "no end": (Behaviour(hangs=True), "DURATION_EXCEEDED"),
}


@pytest.mark.parametrize("name", ENDS)
def test_compromised_qemu_img_output_of_a_conversion_is_validated(
    attacked: Daemon, place: Path, image: Path, name: str
) -> None:
    """A result that is none is not published, and its words go to nobody but the log."""
    run, expected = ENDS[name]
    program.write(place, info=said(), otherwise=run)
    out = image.with_suffix(".raw")
    # With a cache mode, for a job copies what is small without qemu-img.
    request = conversion(image, out, dest_format="raw", cache_mode=pb.CACHE_MODE_WRITEBACK)
    with attacked.limited(**LIMITS.get(expected, {})):
        answer = simple_calls.outcome_of(attacked.agent(ALICE).convert(request))
    assert answer.reason == expected
    assert b"shadow" not in answer.received
    assert b"Permission" not in answer.received
    assert os.listdir(image.parent) == [image.name]


MAPPED: Final = said(format="vdi")
"""An image that is asked for a map instead of a check."""

VDI: Final = b"<<< an image >>>".ljust(64, b"\0") + struct.pack(
    "<IIII", 0xBEDA107F, 0x10001, 400, 1
)
"""How a dynamic one begins. Source: qemu block/vdi.c."""

EXAMINED: Final[dict[str, tuple[Behaviour, Behaviour, str]]] = {
    "nothing": (said(), Behaviour(), "IMAGE_REFUSED"),
    "no JSON": (said(), Behaviour(out=b"\xff{"), "IMAGE_REFUSED"),
    "brackets without end": (said(), Behaviour(out=b"[" * 500_000), "IMAGE_REFUSED"),
    "an end that is a text": (said(), Behaviour(out=b'{"image-end-offset": ""}'), "IMAGE_REFUSED"),
    "an end beyond all": (said(), Behaviour(out=b'{"image-end-offset": 1e999}'), "IMAGE_REFUSED"),
    "an end too far": (said(), Behaviour(out=b'{"image-end-offset": 65537}'), "IMAGE_REFUSED"),
    "a failure": (said(), Behaviour(err=FORGED, status=63), "CONVERSION_FAILED"),
    "a failure to read": (
        said(),
        Behaviour(err=b"error while reading '/etc/shadow': Permission denied", status=1),
        "READ_FAILED",
    ),
    "no end": (said(), Behaviour(hangs=True), "DURATION_EXCEEDED"),
    "no end of words": (said(), Behaviour(out=b"a" * 4096, repeats=True), "DURATION_EXCEEDED"),
    "a map of no JSON": (MAPPED, Behaviour(out=b"[{\n"), "IMAGE_REFUSED"),
    "a map of a number": (MAPPED, Behaviour(out=b"1\n"), "IMAGE_REFUSED"),
    "a map of another thing": (
        MAPPED,
        Behaviour(out=b'[{"data": true, "offset": []}]'),
        "IMAGE_REFUSED",
    ),
    "a map of one line without end": (
        MAPPED,
        Behaviour(out=b"a" * 4096, repeats=True),
        "IMAGE_REFUSED",
    ),
    "a map without end": (
        MAPPED,
        Behaviour(out=b'{"data": true, "offset": 1, "length": 1},\n' * 512, repeats=True),
        "IMAGE_REFUSED",
    ),
}


@pytest.mark.parametrize("name", EXAMINED)
def test_compromised_qemu_img_report_about_image_tables_is_validated(
    attacked: Daemon, place: Path, image: Path, name: str
) -> None:
    """Nothing is published before they are known to be right."""
    info, otherwise, expected = EXAMINED[name]
    program.write(place, info=info, otherwise=otherwise)
    if info is MAPPED:
        image.write_bytes(VDI.ljust(65536, b"\0"))
    with attacked.limited(**LIMITS.get(expected, {})):
        answer = simple_calls.convert(attacked, image, image.with_suffix(".raw"), "")
    assert answer.reason == expected
    assert b"shadow" not in answer.received
    assert os.listdir(image.parent) == [image.name]


def test_compromised_qemu_img_output_can_not_forge_a_log_line(attacked: Daemon) -> None:
    """Both failures above said one."""
    assert not any(line.startswith("INFO convertd.audit[1]") for line in attacked.log.splitlines())
    assert "Traceback" not in attacked.log


def test_compromised_qemu_img_can_name_only_backing_files_its_caller_may_read(
    attacked: Daemon, place: Path, image: Path, secret: Secret
) -> None:
    """And that one is then given to a qemu-img for reading, as any other of the caller's."""
    for name, is_refused in ((str(secret.raw), True), ("absent.raw", True), (image.name, True)):
        lie = said(**{"backing-filename": name, "backing-filename-format": "raw"})
        program.write(place, info=lie, otherwise=Behaviour(status=1))
        answer = simple_calls.convert(attacked, image, image.with_suffix(".raw"), "")
        assert (answer.reason == "BACKING_REFUSED") is is_refused
