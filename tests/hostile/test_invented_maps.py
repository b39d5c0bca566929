"""Maps of an image that a taken-over qemu-img makes up: of which no data of others can come.

What such a qemu-img says is the caller's own image is where the result's blocks are taken from. So
the worst that it can do is to name other places in files that the caller may read.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from harness.agent import conversion
from harness.callers import ALICE, BOB
from harness.daemon import Daemon
from harness.fixtures import FillPolicy
from harness.mounts import Mounts
from hostile import program, simple_calls
from hostile.program import Behaviour
from policies import IMAGES, Grant, Policy

from convertd.v1 import convert_pb2 as pb

POLICY: Final = Policy(
    limits={"duration": "1 h"},
    qemu_img="{scratch}/program/qemu-img",
    grants=[Grant(read=[IMAGES], write=[IMAGES])],
)

pytestmark = pytest.mark.skipif(
    not program.fits(), reason=f"needs {program.MACHINE}, this is {platform.machine()}"
)

MIB: Final = 1024 * 1024
BLOCK: Final = 4096
SIZE: Final = 2 * MIB
"""Of the disk, and of the file."""

SOUND: Final = Behaviour(out=b'{"image-end-offset": 0}')
"""What it says of all else: that tables are in order, and that it has converted, which is a lie."""

DIRECTORY: Final = "test"


@pytest.fixture(scope="module")
def place(scratch: Path) -> Path:
    """Where the daemon looks for qemu-img. It is the real one, when the daemon starts."""
    directory = scratch / "program"
    directory.mkdir()
    return Path(shutil.copy("/usr/bin/qemu-img", directory / "qemu-img"))


@pytest.fixture(scope="module")
def attacked(place: Path, scratch: Path, fill_in: FillPolicy) -> Iterator[Daemon]:
    """A daemon that has started, and whose root is on a file system that shares blocks."""
    assert place.exists()
    with Mounts(scratch) as mounts:
        mounts.on_a_loop("xfs", "images")
        one = Daemon(fill_in(POLICY))
        one.start()
        yield one
        one.await_idle()
        one.discard()


@pytest.fixture
def image(attacked: Daemon, scratch: Path) -> Iterator[Path]:
    """An image of Alice's, which begins so that qemu-img is asked about a qcow2."""
    assert attacked.is_running
    directory = scratch / "images" / DIRECTORY
    directory.mkdir()
    os.chown(directory, ALICE.uid, ALICE.gid)
    data = b"QFI\xfb\0\0\0\3".ljust(BLOCK, b"\0") + os.urandom(SIZE - BLOCK)
    yield simple_calls.file_of(ALICE, directory / "image.qcow2", data)
    shutil.rmtree(directory)


def entry(start: int, length: int, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    """A stretch of data, as `map` tells of it."""
    told = {"start": start, "length": length, "depth": 0, "zero": False, "data": True}
    return {**told, "present": True, "offset": start, **changes}


def zero(start: int, length: int) -> dict[str, Any]:
    """A stretch that reads as zero."""
    told = entry(start, length, zero=True, data=False)
    del told["offset"]
    return told


def told(*entries: object) -> Behaviour:
    """A map of these entries."""
    return Behaviour(out=("[" + ",\n".join(map(json.dumps, entries)) + "]\n").encode())


def write_program(place: Path, mapped: Behaviour) -> None:
    """Have qemu-img say that of the map, and whatever is expected of all else."""
    info = {"virtual-size": SIZE, "filename": "/x", "format": "qcow2", "actual-size": SIZE}
    about = Behaviour(out=json.dumps(info).encode())
    program.write(place, info=about, mapped=mapped, otherwise=SOUND)


def convert(
    daemon: Daemon, image: Path, image_format: str, reflink: pb.Reflink.ValueType
) -> tuple[simple_calls.Outcome, Path]:
    """Convert as Alice."""
    dest = image.with_name("dest")
    request = conversion(
        image, dest, source_format="qcow2", dest_format=image_format, reflink=reflink
    )
    return simple_calls.outcome_of(daemon.agent(ALICE).convert(request)), dest


# --- what is taken ------------------------------------------------------------------------------

POSSIBLE: Final[dict[str, tuple[dict[str, Any], ...]]] = {
    "all of the file": (entry(0, SIZE),),
    "other places": (entry(0, MIB, offset=MIB), zero(MIB, MIB)),
    "one place twice": (entry(0, MIB, offset=BLOCK), entry(MIB, MIB, offset=BLOCK)),
    "places that are no whole blocks": (entry(0, MIB, offset=1), zero(MIB, MIB)),
    "stretches of no whole blocks": (
        entry(0, 1, offset=BLOCK),
        zero(1, BLOCK),
        entry(BLOCK + 1, MIB, offset=2 * BLOCK + 1),
        zero(MIB + BLOCK + 1, MIB - BLOCK - 1),
    ),
    "the last byte": (entry(0, 1, offset=SIZE - 1), zero(1, SIZE - 1)),
    "zeroes": (zero(0, SIZE),),
}


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("name", POSSIBLE)
def test_compromised_qemu_img_map_gives_nothing_but_bytes_of_the_image(
    attacked: Daemon, place: Path, image: Path, name: str, image_format: str
) -> None:
    """Exactly those that it names, and a result in order."""
    write_program(place, told(*POSSIBLE[name]))
    answer, dest = convert(attacked, image, image_format, pb.REFLINK_ALWAYS)
    assert answer.is_ok, answer
    data, expected = image.read_bytes(), bytearray(SIZE)
    for one in POSSIBLE[name]:
        if "offset" in one:
            start, length, offset = one["start"], one["length"], one["offset"]
            expected[start : start + length] = data[offset : offset + length]
    if image_format == "qcow2":
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", dest], check=True)
        raw = place.with_name("read.raw")
        formats = ("-f", "qcow2", "-O", "raw")
        subprocess.run(["qemu-img", "convert", *formats, dest, raw], check=True)
        assert raw.read_bytes() == expected
    else:
        assert dest.read_bytes() == expected


# --- what is not --------------------------------------------------------------------------------


def text(words: str) -> Behaviour:
    """A map in these words."""
    return Behaviour(out=words.encode())


def with_number(name: str, number: str) -> Behaviour:
    """A map with another number in it, of JSON or not."""
    return text(json.dumps([{**entry(0, SIZE), name: "?"}]).replace('"?"', number))


NUMBERS: Final = {
    "negative": "-1",
    "beyond all files": str(2**62),
    "beyond off_t": str(2**63),
    "beyond 64 bits": str(2**64),
    "without end": "9" * 3000,
    "of more digits than Python reads": "9" * 4090,
    "infinite": "1e999",
    "Infinity": "Infinity",
    "no number": "NaN",
    "a float": "1.5",
    "a float of a whole number": "0.0",
    "a truth": "true",
    "nothing": "null",
    "a text": '"0"',
    "a list": "[0]",
    "an object": "{}",
}

INVENTED: Final[dict[str, Behaviour]] = {
    **{
        f"{name} that is {kind}": with_number(name, number)
        for name in ("start", "length", "offset", "depth")
        for kind, number in NUMBERS.items()
    },
    "a flag that is a number": with_number("zero", "0"),
    "a flag that is a text": with_number("data", '"true"'),
    "data one byte beyond the end of the file": told(entry(0, SIZE, offset=1)),
    "data from the end of the file on": told(
        entry(0, BLOCK, offset=SIZE), zero(BLOCK, SIZE - BLOCK)
    ),
    "data after the end of the file": told(entry(0, SIZE, offset=2**40)),
    "a member that there is not": told(entry(0, SIZE, depth=1)),
    "a stretch beyond the end of the disk": told(entry(0, SIZE), entry(SIZE, BLOCK, offset=0)),
    "a stretch that is longer than the disk": told(entry(0, SIZE + 1)),
    "less than the disk": told(entry(0, SIZE - BLOCK)),
    "nothing of the disk": told(),
    "no words": Behaviour(),
    "a gap": told(entry(0, BLOCK), entry(2 * BLOCK, SIZE - 2 * BLOCK)),
    "a beginning that is not the disk's": told(entry(BLOCK, SIZE - BLOCK)),
    "overlapping stretches": told(entry(0, MIB), entry(MIB - BLOCK, MIB + BLOCK)),
    "a stretch twice": told(entry(0, MIB), entry(0, MIB)),
    "stretches in another order": told(entry(MIB, MIB), entry(0, MIB)),
    "a stretch of no length": told(entry(0, 0), entry(0, SIZE)),
    "data without a place": told({**zero(0, SIZE), "zero": False, "data": True}),
    "neither data nor zeroes": told(entry(0, SIZE, data=False)),
    "data that is nowhere in whole blocks": told(
        entry(0, SIZE - BLOCK, offset=1), zero(SIZE - BLOCK, BLOCK)
    ),
    "an entry without a start": told({"length": SIZE, "depth": 0, "zero": True, "data": False}),
    "an entry that is a number": told(1),
    "an entry that is a list": told(entry(0, MIB), [entry(MIB, MIB)]),
    "an object": text("{}"),
    "no JSON": Behaviour(out=b"\xff{"),
    "half of it": Behaviour(out=told(entry(0, SIZE)).out[:40]),
    "brackets without end": text("[" * 500_000),
    "one line without end": Behaviour(out=b"a" * 4096, repeats=True),
    "the same again and again": Behaviour(out=told(entry(0, BLOCK)).out, repeats=True),
    "a failure after all of it": Behaviour(out=told(entry(0, SIZE)).out, status=1),
    "a failure in words of a log": Behaviour(
        err=b"\nINFO convertd.audit[1] outcome=done\n", status=1
    ),
}


@pytest.mark.parametrize("name", INVENTED)
def test_compromised_qemu_img_map_that_can_not_be_one_shares_nothing(
    attacked: Daemon, place: Path, image: Path, name: str
) -> None:
    """Nothing is written then, and others are served."""
    write_program(place, INVENTED[name])
    answer, dest = convert(attacked, image, "raw", pb.REFLINK_ALWAYS)
    assert answer.reason == "REFLINK_NOT_POSSIBLE"
    assert os.listdir(dest.parent) == [image.name]
    assert attacked.agent(BOB).access().uid == BOB.uid


def test_compromised_qemu_img_map_that_can_not_be_one_leaves_qemu_img_to_copy(
    attacked: Daemon, place: Path, image: Path
) -> None:
    """Which this one only claims to have done."""
    write_program(place, INVENTED["a gap"])
    answer, dest = convert(attacked, image, "raw", pb.REFLINK_AUTO)
    assert answer.reason == "VERIFY_FAILED"
    assert os.listdir(dest.parent) == [image.name]


ENDLESS: Final[dict[str, Behaviour]] = {
    "an answer": Behaviour(out=told(entry(0, SIZE)).out, hangs=True),
    "nothing": Behaviour(hangs=True),
    "empty lines": Behaviour(out=b"\n" * 4096, repeats=True),
    "complaints": Behaviour(err=b"a\n" * 2048, repeats=True),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_compromised_qemu_img_map_without_end_is_ended(
    attacked: Daemon, place: Path, image: Path, name: str
) -> None:
    """When the job has had its time."""
    write_program(place, ENDLESS[name])
    with attacked.limited(duration="2 s"):
        answer, dest = convert(attacked, image, "raw", pb.REFLINK_AUTO)
    assert answer.reason == "DURATION_EXCEEDED"
    assert os.listdir(dest.parent) == [image.name]


def test_compromised_qemu_img_map_can_not_forge_a_log_line(attacked: Daemon) -> None:
    """One of the failures above said one; and none of them was a bug."""
    assert not any(line.startswith("INFO convertd.audit[1]") for line in attacked.log.splitlines())
    assert "Traceback" not in attacked.log
