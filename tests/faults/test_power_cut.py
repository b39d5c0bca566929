"""What a power cut leaves: the old image whole, the new one whole, or nothing. At any instant.

A disk is an image on a file system that shares blocks, mounted by a loop device. A copy of the
image that shares its blocks is what the disk holds at that instant: all that the file system has
handed to it, and nothing that still waits in memory. The copy is mounted, which replays the journal
as a start after a power cut does, and looked at. Nothing is frozen or synchronised for it.

What this can't show is a disk that loses what it acknowledged, or writes in another order between
two flushes: the loop device keeps all that it has taken.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import itertools
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from harness import images, waiting
from harness.agent import Agent, conversion
from harness.callers import ALICE, owner_of
from harness.daemon import Daemon
from harness.mounts import Mounts
from harness.tracing import Tracer
from policies import Grant, Policy, Root

from convertd.v1 import convert_pb2 as pb

DISKS: Final = Root("disks", "{scratch}", mounts=True)
POLICY: Final = Policy(grants=[Grant(read=[DISKS], write=[DISKS])])

CUTS: Final = int(os.environ.get("CONVERTD_TEST_POWER_CUTS", "20"))

MOST_CONTROLS: Final = 50
"""After so many cuts that found nothing torn, the harness shows nothing."""
"""How many instants, for each file system."""

SEED: Final = int(os.environ.get("CONVERTD_TEST_SEED", str(random.SystemRandom().getrandbits(32))))

CUTS_A_CONVERSION: Final = 4
SOURCES: Final = 3
SOURCES_ARE_IN: Final = "sources"
SOURCE_MIB: Final = 6
SLOW_MIB: Final = 30
OUTER_MIB: Final = 2048

PUBLISHING: Final = ("fsync", "linkat", "renameat2", "unlinkat")
SLOWED_MS: Final = 15
"""What publishing consists of, and how much longer each step takes when it is to be hit."""


class Found(enum.Enum):
    """What is under the destination's name after a cut."""

    ABSENT = "absent"
    OLD = "old"
    NEW = "new"
    TORN = "torn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """What a file is to be: the image of a source, in a format."""

    source: Path
    format: str

    @property
    def source_format(self) -> str:
        """The format of the source, which its name tells."""
        return self.source.suffix[1:]

    def is_in(self, file: Path) -> bool:
        """Whether the file is that, from the first byte to the last."""
        formats = ("-f", self.source_format, "-F", self.format)
        argv = ["qemu-img", "compare", *formats, str(self.source), str(file)]
        done = subprocess.run(argv, check=False, capture_output=True)
        return done.returncode == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One conversion: the name of the destination, what it was before, and what it is to be."""

    name: str
    old: Version | None
    new: Version


class Disk:
    """A file system, mounted at `point`, whose power can be cut in a copy."""

    def __init__(self, kind: str, outer: Path, point: Path) -> None:
        """The disk whose image `Mounts` made beside its mount point."""
        self.kind = kind
        self.point = point
        self._image = outer / f".{kind}.{kind}"
        self._copies = outer / "cuts"
        self._copies.mkdir(exist_ok=True)
        self._numbers = itertools.count()

    def cut(self) -> Path:
        """The disk as it is at this instant."""
        copy = self._copies / f"{self.kind}-{next(self._numbers)}"
        argv = ["cp", "--reflink=always", str(self._image), str(copy)]
        subprocess.run(argv, check=True)
        return copy

    @contextlib.contextmanager
    def started_again(self, copy: Path) -> Iterator[Path]:
        """The disk of a cut, mounted. It is gone afterwards."""
        point = self._copies / f"{copy.name}.mounted"
        point.mkdir()
        options = "loop,nouuid" if self.kind == "xfs" else "loop"
        subprocess.run(["mount", "-o", options, str(copy), str(point)], check=True)
        try:
            yield point
        finally:
            subprocess.run(["umount", str(point)], check=True)
            point.rmdir()
            copy.unlink()

    def remove(self, name: str) -> None:
        """Remove a file, so that a cut after this does not bring it back."""
        (self.point / name).unlink()
        directory = os.open(self.point, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


@pytest.fixture(scope="module")
def outer(mounts: Mounts) -> Path:
    """Where the disks' images lie: a file system whose files can share blocks."""
    return mounts.on_a_loop("xfs", "outer", OUTER_MIB)


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def disk(outer: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    """A disk whose power will be cut."""
    with Mounts(outer) as inner:
        point = inner.on_a_loop(request.param, request.param, 96)
        yield Disk(request.param, outer, point)


@pytest.fixture(scope="module")
def sources(disk: Disk) -> tuple[Path, ...]:
    """Images without a block in common, the last a qcow2.

    They are on the disk itself, where XFS can share their blocks.
    """
    directory = disk.point / SOURCES_ARE_IN
    directory.mkdir()
    made = [image_of(SOURCE_MIB, directory / f"{number}.raw") for number in range(SOURCES)]
    last = images.converted(made[-1], made[-1].with_suffix(".qcow2"), "qcow2")
    made[-1].unlink()
    return (*made[:-1], last)


@pytest.fixture(scope="module")
def slow_sources(outer: Path) -> tuple[Path, ...]:
    """Images that qemu-img takes long enough to write for a cut to hit it."""
    return tuple(image_of(SLOW_MIB, outer / f"slow-{number}.raw") for number in range(2))


def image_of(size_mib: int, path: Path) -> Path:
    """A raw image of random bytes, the middle third of it a hole."""
    third = size_mib * images.MIB // 3
    with path.open("wb") as file:
        file.write(os.urandom(third))
        file.seek(2 * third)
        file.write(os.urandom(third))
    return path


@pytest.fixture
def chance() -> random.Random:
    """The test's dice. A run is thrown again with CONVERTD_TEST_SEED."""
    print(f"CONVERTD_TEST_SEED={SEED}")  # noqa: T201 - whoever reads a failure needs it
    return random.Random(SEED)  # noqa: S311 - not for secrets


@pytest.fixture(params=["as it comes", "with publishing slowed down"])
def alice(
    outer: Path, disk: Disk, daemon: Daemon, request: pytest.FixtureRequest
) -> Iterator[Agent]:
    """Calls as uid 1234. Some of the cuts are to hit what takes but a moment."""
    assert outer.exists()
    assert disk.point.exists()
    with contextlib.ExitStack() as stack:
        if request.param != "as it comes":
            delay = f"delay_exit={SLOWED_MS * 1000}"
            stack.enter_context(Tracer(daemon.traced(), f"{','.join(PUBLISHING)}:{delay}"))
            stack.enter_context(synchronised(disk.point))
        yield daemon.agent(ALICE)


@contextlib.contextmanager
def synchronised(point: Path) -> Iterator[None]:
    """Have the file system write down all that it knows, again and again.

    Otherwise a journal keeps what is not flushed to itself for seconds, and no cut finds it.
    """
    argv = ["sh", "-c", 'while sync -f "$0"; do :; done', str(point)]
    process = subprocess.Popen(argv)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


# --- the proof ----------------------------------------------------------------------------------


@pytest.mark.timeout(300 + 2 * CUTS)
@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwrite"])
def test_power_cut_leaves_a_whole_image_or_none(
    alice: Agent,
    disk: Disk,
    sources: tuple[Path, ...],
    chance: random.Random,
    *,
    overwrite: bool,
) -> None:
    """In the middle of a conversion; and once the call has returned, the new one in any case."""
    tally: collections.Counter[str] = collections.Counter()
    before: Version | None = None
    usual_s = 0.3
    for number in range(1 + CUTS // 4 // CUTS_A_CONVERSION):
        new = Version(
            source=chance.choice([path for path in sources if not before or path != before.source]),
            format=chance.choice(["raw", "qcow2"]),
        )
        attempt = Attempt(name="image" if overwrite else f"image-{number}", old=before, new=new)
        usual_s, copies = converted(alice, disk, attempt, chance, usual_s)
        for copy in copies:
            found, temporaries = state_after_cut(disk, copy, attempt)
            tally[found.value] += 1
            tally["with a temporary"] += temporaries
            assert found in {Found.ABSENT if before is None else Found.OLD, Found.NEW}
            assert overwrite or not temporaries
        found, _ = state_after_cut(disk, disk.cut(), attempt)
        tally["after the call"] += 1
        assert found is Found.NEW, "the call had returned"
        if overwrite:
            before = new
        else:
            disk.remove(attempt.name)
    if overwrite:
        disk.remove("image")
    print(disk.kind, dict(tally))  # noqa: T201 - the figures of a long run


def converted(
    alice: Agent, disk: Disk, attempt: Attempt, chance: random.Random, usual_s: float
) -> tuple[float, list[Path]]:
    """Convert, and cut the power of copies meanwhile. Gives the seconds that the job took, too."""
    instants = sorted(chance.uniform(0, usual_s) for _ in range(CUTS_A_CONVERSION - 1))
    shares = disk.kind == "xfs"
    request = conversion(
        attempt.new.source,
        disk.point / attempt.name,
        source_format=attempt.new.source_format,
        dest_format=attempt.new.format,
        overwrite=attempt.old is not None,
        cache_mode=chance.choice([pb.CACHE_MODE_AUTO, pb.CACHE_MODE_WRITEBACK]),
        reflink=chance.choice([pb.REFLINK_ALWAYS if shares else pb.REFLINK_AUTO, pb.REFLINK_NEVER]),
    )
    began = time.monotonic()
    call = alice.convert(request)
    copies = []
    for instant in instants:
        # An instant of chance is what is wanted here, and no fact to be waited for.
        time.sleep(max(began + instant - time.monotonic(), 0))
        copies.append(disk.cut())
    return call.result().elapsed_seconds, copies


def state_after_cut(disk: Disk, copy: Path, attempt: Attempt) -> tuple[Found, int]:
    """What a cut left under the destination's name, and how many temporaries.

    A temporary is what an overwriting job has linked and not yet exchanged, or what it replaced:
    the new image or the old one, whole, and under the destination's name the other one.
    """
    with disk.started_again(copy) as point:
        names = set(os.listdir(point)) - {"lost+found", SOURCES_ARE_IN, attempt.name}
        for name in names:
            assert name.startswith(".convertd-"), name
            assert name.endswith(".tmp"), name
            states = [state(point / one, attempt) for one in (name, attempt.name)]
            assert set(states) == {Found.NEW, Found.OLD}
        return state(point / attempt.name, attempt), len(names)


def state(file: Path, attempt: Attempt) -> Found:
    """Which of the versions a file is."""
    if not file.exists():
        return Found.ABSENT
    for version, found in ((attempt.old, Found.OLD), (attempt.new, Found.NEW)):
        if version and version.is_in(file):
            assert owner_of(file) in {(ALICE.uid, ALICE.gid, 0o600), (0, 0, 0o644)}
            return found
    return Found.TORN


# --- what it proves nothing without -------------------------------------------------------------


def in_place(attempt: Attempt, dest: Path) -> None:
    """What qemu-img does by itself: it writes under the destination's own name."""
    qemu_img("-t", "none", attempt, dest)


def in_place_of_another(attempt: Attempt, dest: Path) -> None:
    """The same, into a file that is there: not even the file system's journal notices."""
    qemu_img("-n", "-t", "none", attempt, dest)


def unsafely(attempt: Attempt, dest: Path) -> None:
    """What looks whole: another name, then rename(2); and never an fsync(2)."""
    temporary = dest.with_suffix(".part")
    qemu_img("-t", "unsafe", attempt, temporary)
    temporary.rename(dest)


def qemu_img(*arguments: str | Attempt | Path) -> None:
    """Run qemu-img, slowly enough to be hit. The last two arguments are what and where."""
    *options, attempt, dest = arguments
    assert isinstance(attempt, Attempt)
    argv = ["qemu-img", "convert", *map(str, options), "-r", "64M", "-O", attempt.new.format]
    subprocess.run([*argv, str(attempt.new.source), str(dest)], check=True)


@pytest.mark.timeout(300 + 2 * CUTS)
@pytest.mark.parametrize(
    ("image_format", "convert"),
    [("raw", in_place_of_another), ("qcow2", in_place)],
    ids=["raw", "qcow2"],
)
def test_control_power_cut_test_detects_a_half_written_image(
    disk: Disk,
    slow_sources: tuple[Path, ...],
    chance: random.Random,
    image_format: str,
    convert: Callable[[Attempt, Path], None],
) -> None:
    """Writing in place is torn in the middle."""
    old = Version(source=slow_sources[1], format="raw")
    new = Version(source=slow_sources[0], format=image_format)
    attempt = Attempt(name="control", old=old, new=new)
    tally = control(disk, attempt, convert, chance)
    print(disk.kind, dict(tally))  # noqa: T201 - the figures of a long run
    assert tally[Found.TORN]


def test_control_power_cut_test_detects_a_missing_fsync(
    disk: Disk, sources: tuple[Path, ...]
) -> None:
    """Renamed into place without fsync(2), an image is gone, or empty, after a cut."""
    attempt = Attempt(name="control", old=None, new=Version(source=sources[0], format="raw"))
    unsafely(attempt, disk.point / attempt.name)
    copy = disk.cut()
    disk.remove(attempt.name)
    with disk.started_again(copy) as point:
        assert state(point / attempt.name, attempt) is not Found.NEW


def control(
    disk: Disk,
    attempt: Attempt,
    convert: Callable[[Attempt, Path], None],
    chance: random.Random,
) -> collections.Counter[Found]:
    """Cancelled at random instants while something else than convertd overwrites a file."""
    dest = disk.point / attempt.name
    tally: collections.Counter[Found] = collections.Counter()
    while tally.total() < max(CUTS // 4, 5) or (
        not tally[Found.TORN] and tally.total() < MOST_CONTROLS
    ):
        assert attempt.old is not None
        shutil.copyfile(attempt.old.source, dest)
        subprocess.run(["sync", "-f", str(dest)], check=True)
        whole = dest.stat().st_mtime_ns
        pid = os.fork()
        if pid == 0:
            convert(attempt, dest)
            os._exit(0)
        waiting.until(lambda then=whole: dest.stat().st_mtime_ns != then, "it is written to")  # type: ignore[misc]
        # As in converted(): an instant of chance.
        time.sleep(chance.uniform(0.0, 0.2))
        copy = disk.cut()
        assert os.waitpid(pid, 0)[1] == 0
        with disk.started_again(copy) as point:
            tally[state(point / attempt.name, attempt)] += 1
        disk.remove(attempt.name)
    return tally
