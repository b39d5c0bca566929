"""Images that a crash has damaged, while what is in them is all there."""

from __future__ import annotations

import dataclasses
import logging
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import children
import grants
import pytest
import whole_job

from convertd_daemon.job import damage
from convertd_daemon.job.qemu import execution

MIB: Final = 1024 * 1024
CLUSTER: Final = 65536
COPIED: Final = 1 << 63
BEYOND: Final = 1 << 40


class Tables:
    """The tables of a small qcow2, to be damaged. Everything in it is found by its header."""

    def __init__(self, path: Path) -> None:
        """Open it."""
        self.fd = os.open(path, os.O_RDWR)
        self.l1 = self.number(40)
        self.l2 = self.number(self.l1) & ~COPIED
        self.refcounts = self.number(self.number(48))

    def number(self, offset: int) -> int:
        """Eight bytes."""
        (value,) = struct.unpack(">Q", os.pread(self.fd, 8, offset))
        return int(value)

    def put(self, offset: int, value: int) -> None:
        """Eight bytes."""
        os.pwrite(self.fd, struct.pack(">Q", value), offset)

    def count(self, entry: int, value: int) -> None:
        """The reference count of the cluster that an entry of the second table leads to."""
        cluster = (self.number(self.l2 + 8 * entry) & ~COPIED) // CLUSTER
        os.pwrite(self.fd, struct.pack(">H", value), self.refcounts + 2 * cluster)

    def mark(self) -> Tables:
        """Mark the image as corrupt."""
        self.put(72, 2)
        return self

    def count_all(self, value: int) -> None:
        """Every reference count."""
        os.pwrite(self.fd, struct.pack(">H", value) * (CLUSTER // 2), self.refcounts)


READABLE: Final[dict[str, Callable[[Tables], None]]] = {
    "marked as corrupt": lambda image: image.put(72, 2),
    "flag of a cluster": lambda image: image.put(
        image.l2 + 8, image.number(image.l2 + 8) & ~COPIED
    ),
    "flag of a table": lambda image: image.put(image.l1, image.l2),
    "count too high": lambda image: image.count(2, 5),
    "count of 0": lambda image: image.count(2, 0),
    "all counts of 0": lambda image: image.count_all(0),
    "marked, and a count of 0": lambda image: image.mark().count(2, 0),
}
"""What bare qemu-img converts right."""

MISSING: Final[dict[str, Callable[[Tables], None]]] = {
    "cluster beyond the end": lambda image: image.put(image.l2 + 8, COPIED | BEYOND),
    "table beyond the end": lambda image: image.put(image.l1, COPIED | BEYOND),
    "cluster on a table": lambda image: image.put(image.l2 + 8, COPIED | image.l2),
    "cluster of two": lambda image: image.put(image.l2 + 8, image.number(image.l2)),
    "marked, and a table beyond the end": lambda image: image.mark().put(image.l1, COPIED | BEYOND),
}
"""What bare qemu-img makes something else of, with status 0."""


@pytest.fixture
def data() -> bytes:
    """What a guest wrote."""
    return os.urandom(2 * MIB)


def damaged(path: Path, data: bytes, how: Callable[[Tables], object], *options: str) -> Path:
    """A qcow2 with that, and damaged."""
    raw = path.with_suffix(".raw")
    raw.write_bytes(data)
    argv = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, str(raw), str(path)]
    subprocess.run(argv, check=True)
    image = Tables(path)
    how(image)
    os.close(image.fd)
    return path


def converted(
    source: Path, *, accept: bool, allow: bool = True, **asked: object
) -> whole_job.JobEvents:
    """Convert it to `out`."""
    request = grants.request(source, source.parent / "out", "qcow2")
    accepting = dataclasses.replace(request.source, accept_damaged=accept)
    request = dataclasses.replace(request, source=accepting, **asked)  # type: ignore[arg-type]
    root = grants.files(source.parent, accept_damaged=allow)
    return whole_job.run(grants.Rules(roots=(root,)).convert(request))


def bare(source: Path) -> bytes:
    """What bare qemu-img makes of it, and says 0 of."""
    out = source.with_suffix(".bare")
    argv = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(source), str(out)]
    subprocess.run(argv, check=True, stderr=subprocess.DEVNULL)
    return out.read_bytes()


@pytest.mark.parametrize("kind", READABLE)
def test_damaged_image_is_converted_if_the_caller_accepts_it(
    area: Path, data: bytes, kind: str
) -> None:
    """All of it, with a warning; and the source stays as it is."""
    source = damaged(area / "in", data, READABLE[kind])
    before = source.read_bytes()
    assert bare(source) == data
    outcome = converted(source, accept=True)
    assert outcome.failure is None
    assert "SOURCE_DAMAGED" in {warning.reason for warning in outcome.published.warnings}
    assert (area / "out").read_bytes() == data
    assert source.read_bytes() == before


@pytest.mark.parametrize("kind", READABLE)
@pytest.mark.parametrize("dry", [False, True], ids=["convert", "dry run"])
def test_damaged_image_is_refused_if_the_caller_does_not_accept_it(
    area: Path, data: bytes, kind: str, *, dry: bool
) -> None:
    """With what there is to say."""
    source = damaged(area / "in", data, READABLE[kind])
    outcome = converted(source, accept=False, validate_only=dry)
    assert outcome.reason == "IMAGE_DAMAGED"
    assert not (area / "out").exists()


@pytest.mark.parametrize("kind", ["marked as corrupt", "count of 0"])
def test_damaged_image_is_refused_if_its_root_does_not_allow_it(
    area: Path, data: bytes, kind: str
) -> None:
    """Whatever is asked; and a sound image is converted whatever is asked."""
    source = damaged(area / "in", data, READABLE[kind])
    outcome = converted(source, accept=True, allow=False)
    assert outcome.reason == "DAMAGE_NOT_ALLOWED"
    assert outcome.failure is not None
    assert str(outcome.failure.status) == "PERMISSION_DENIED"
    sound = damaged(area / "sound", data, lambda _: None)
    assert converted(sound, accept=True, allow=False).failure is None


@pytest.mark.parametrize("kind", MISSING)
def test_image_with_missing_data_is_refused_even_if_damage_is_accepted(
    area: Path, data: bytes, kind: str
) -> None:
    """Zeroes, or another's data, in place of a guest's are no conversion."""
    source = damaged(area / "in", data, MISSING[kind])
    assert bare(source) != data
    outcome = converted(source, accept=True)
    assert outcome.reason == "IMAGE_REFUSED"
    assert not (area / "out").exists()


def test_damaged_backing_file_is_checked_too(area: Path, data: bytes) -> None:
    """It is half of what is converted."""
    damaged(area / "base", data, READABLE["marked as corrupt"])
    argv = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "base"]
    subprocess.run([*argv, str(area / "in"), str(len(data))], check=True)
    assert converted(area / "in", accept=False).reason == "IMAGE_DAMAGED"
    assert converted(area / "in", accept=True).failure is None
    assert (area / "out").read_bytes() == data


@pytest.mark.parametrize(
    "said",
    [
        "",
        "ERROR cluster 4 refcount=1 reference=2",
        "ERROR cluster 7 refcount=0 reference=1\nWarning: something else",
        "ERROR: counting reference for region exceeding the end of the file",
    ],
    ids=["nothing", "a cluster of two", "an unknown line", "beyond the end"],
)
def test_unknown_check_message_is_not_treated_as_harmless(said: str) -> None:
    """A line that is not known may tell of data that is gone."""
    complaints = damage.Complaints()
    complaints.take(said.encode())
    assert not complaints.are_harmless()


def test_check_message_without_an_end_is_not_harmless_and_not_stored() -> None:
    """And is not kept."""
    complaints = damage.Complaints()
    complaints.take(b"ERROR cluster 7 refcount=0 reference=1\n")
    complaints.take(b"x" * damage.LONGEST_LINE_BYTES * 2)
    assert not complaints.are_harmless()


@pytest.mark.parametrize("pieces", [1, 7, 4096])
def test_check_messages_are_parsed_however_the_output_is_split(pieces: int) -> None:
    """A pipe gives them in pieces."""
    said = b"Leaked cluster 4 refcount=1 reference=0\nERROR cluster 7 refcount=0 reference=1\n"
    complaints = damage.Complaints()
    for start in range(0, len(said), pieces):
        complaints.take(said[start : start + pieces])
    assert complaints.are_harmless()


class TestDirtyImages:
    """A qcow2 whose dirty flag is set: its counts are wrong as a matter of course."""

    def test_dirty_qcow2_with_wrong_reference_counts_is_converted(
        self, area: Path, data: bytes
    ) -> None:
        """Whatever they say."""
        source = damaged(area / "in", data, lambda image: not_closed(image).count_all(0))
        outcome = converted(source, accept=False)
        assert outcome.failure is None
        assert {warning.reason for warning in outcome.published.warnings} == {"SOURCE_DIRTY"}
        assert (area / "out").read_bytes() == data

    @pytest.mark.parametrize("kind", MISSING)
    def test_dirty_qcow2_with_missing_data_is_refused(
        self, area: Path, data: bytes, kind: str
    ) -> None:
        """A map alone says of a table that is not there that all of it is zero."""
        source = damaged(area / "in", data, MISSING[kind])
        image = Tables(source)
        not_closed(image)
        os.close(image.fd)
        assert bare(source) != data
        assert converted(source, accept=True).reason == "IMAGE_REFUSED"
        assert not (area / "out").exists()

    def test_qemu_img_messages_about_an_image_do_not_fill_the_log(
        self, area: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """The beginning and the end of it are enough for whoever reads it."""
        source = damaged(area / "in", os.urandom(20 * MIB), not_closed, "-o", "cluster_size=512")
        zero_all_counts(source)
        os.truncate(source, source.stat().st_size // 2)
        with children.logging_to_stderr(logging.INFO):
            outcome = converted(source, accept=False)
        assert outcome.reason == "IMAGE_REFUSED"
        logged = capfd.readouterr().err
        assert "corrupt path=" in logged
        assert len(logged) < 10_000

    def test_all_check_messages_count_even_more_than_are_stored(self, area: Path) -> None:
        """One for each of many small clusters."""
        data = os.urandom(20 * MIB)
        source = damaged(area / "in", data, not_closed, "-o", "cluster_size=512")
        zero_all_counts(source)
        check = subprocess.run(
            ["qemu-img", "check", str(source)], stderr=subprocess.PIPE, check=False
        )
        assert len(check.stderr) > execution.MAX_OUTPUT_BYTES
        assert converted(source, accept=False).failure is None
        assert (area / "out").read_bytes() == data


def not_closed(image: Tables) -> Tables:
    """Set the dirty flag, beside what is set there."""
    image.put(72, image.number(72) | 1)
    return image


def zero_all_counts(path: Path) -> None:
    """Zero every block of reference counts of an image with small clusters."""
    fd = os.open(path, os.O_RDWR)
    table, blocks = struct.unpack(">QI", os.pread(fd, 12, 48))
    for index in range(blocks * 512 // 8):
        (block,) = struct.unpack(">Q", os.pread(fd, 8, table + 8 * index))
        if block:
            os.pwrite(fd, bytes(512), block)
    os.close(fd)
