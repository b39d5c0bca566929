"""A root inside another stays closed, whatever name whoever owns the outer one gives to it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from harness import images
from harness.callers import ALICE, BOB
from harness.daemon import Daemon
from harness.fixtures import MakeDaemon
from harness.mounts import Mounts
from hostile import forged, racing, simple_calls
from hostile.forged import Qcow2
from policies import Grant, Policy, Root

OUTER: Final = Root("outer", "{scratch}/outer", mounts=True)
CLOSED: Final = Root("closed", "{scratch}/outer/closed", parents_writable_by=[ALICE.uid])
GRANTED: Final = Root("granted", "{scratch}/outer/granted", parents_writable_by=[ALICE.uid])


def granting(*further: Root, outer: Root = OUTER, closed: Root = CLOSED) -> Policy:
    """ALICE has `outer` and the further roots, BOB the one that is nested in `outer`."""
    return Policy(
        grants=[
            Grant(users=[ALICE.uid], read=[outer, *further], write=[outer, *further]),
            Grant(users=[BOB.uid], read=[closed], write=[closed]),
        ]
    )


POLICY: Final = granting()

MARKER: Final = b"<what only BOB may have read>"
ROUNDS: Final = 25

Move = Callable[[Path], Path]


@pytest.fixture
def outer(scratch: Path) -> Iterator[Path]:
    """A root that is ALICE's own, and in it another, with a file of BOB's."""
    path = scratch / "outer"
    path.mkdir()
    os.chown(path, ALICE.uid, ALICE.gid)
    closed = path / "closed"
    closed.mkdir()
    os.chown(closed, BOB.uid, BOB.gid)
    closed.chmod(0o700)
    simple_calls.file_of(BOB, closed / "disk.raw", (MARKER * forged.SIZE)[: forged.SIZE])
    simple_calls.file_of(ALICE, path / "own.raw", b"x" * forged.SIZE)
    yield path
    subprocess.run(["rm", "-r", str(path)], check=True)


@pytest.fixture
def daemon(outer: Path, make_daemon: MakeDaemon) -> Daemon:
    """A daemon that was started while the names were right."""
    assert outer.is_dir()
    one = make_daemon(POLICY)
    one.start()
    return one


def _renamed(outer: Path) -> Path:
    return (outer / "closed").rename(outer / "c2")


def _replaced(outer: Path) -> Path:
    moved = _renamed(outer)
    (outer / "closed").mkdir()
    return moved


def _moved_down(outer: Path) -> Path:
    (outer / "a").mkdir()
    return (outer / "closed").rename(outer / "a" / "b")


@pytest.mark.parametrize("move", [_renamed, _replaced, _moved_down])
def test_renamed_nested_root_stays_closed(daemon: Daemon, outer: Path, move: Move) -> None:
    """As a source, as the source of an overlay, to be looked at, and to be written to."""
    moved = move(outer)
    out = outer / "out.raw"
    assert simple_calls.convert(daemon, moved / "disk.raw", out, "raw").reason == "OUTSIDE_ROOT"
    assert simple_calls.inspect(daemon, moved / "disk.raw", "raw").reason == "OUTSIDE_ROOT"
    backing = Qcow2(backing=str(moved / "disk.raw"), backing_format="raw").data()
    overlay = simple_calls.file_of(ALICE, outer / "overlay.qcow2", backing)
    assert simple_calls.convert(daemon, overlay, out, "qcow2").reason == "BACKING_REFUSED"
    assert not out.exists()
    assert simple_calls.overwrite(daemon, outer / "own.raw", moved / "new").reason == "OUTSIDE_ROOT"
    assert os.listdir(moved) == ["disk.raw"]
    assert simple_calls.overwrite(daemon, outer / "own.raw", out).is_ok


def test_nested_root_that_swaps_names_continuously_stays_closed(
    daemon: Daemon, outer: Path
) -> None:
    """The directory that was judged is the one that is gone on in."""
    (outer / "mine").mkdir()
    os.chown(outer / "mine", ALICE.uid, ALICE.gid)
    simple_calls.file_of(ALICE, outer / "mine" / "disk.raw", b"y" * forged.SIZE)
    ends: Counter[str] = Counter()
    with racing.swapping(ALICE, outer, "mine", "closed") as count:
        for number in range(ROUNDS):
            out = outer / f"out-{number}.raw"
            answer = simple_calls.convert(daemon, outer / "mine" / "disk.raw", out, "raw")
            ends[answer.reason or answer.status] += 1
            assert not simple_calls.contains(out, MARKER)
    assert count.changes > 10 * ROUNDS
    assert ends.keys() <= {"OK", "OUTSIDE_ROOT"}
    assert len(ends) > 1, "the race was never lost: it tests nothing"


def test_nested_root_that_is_mounted_a_second_time_stays_closed(
    outer: Path, make_daemon: MakeDaemon
) -> None:
    """Where mounts are entered: it is the same directory."""
    with Mounts(outer) as mounts:
        again = mounts.bound(outer / "closed", "again")
        daemon = make_daemon(POLICY)
        daemon.start()
        answer = simple_calls.convert(daemon, again / "disk.raw", outer / "out.raw", "raw")
        assert answer.reason == "OUTSIDE_ROOT"
        daemon.stop()


def test_renamed_nested_root_on_overlayfs_stays_closed(
    scratch: Path, outer: Path, make_daemon: MakeDaemon
) -> None:
    """The first change to a directory of the lower layer makes another inode, with its number."""
    with Mounts(scratch) as mounts:
        merged = mounts.overlaid(outer, "merged")
        policy = granting(
            outer=dataclasses.replace(OUTER, path=str(merged)),
            closed=dataclasses.replace(CLOSED, path=str(merged / "closed")),
        )
        daemon = make_daemon(policy)
        daemon.start()
        as_alice = ["setpriv", f"--reuid={ALICE.uid}", f"--regid={ALICE.gid}", "--clear-groups"]
        moved = merged / "c2"
        subprocess.run([*as_alice, "mv", str(merged / "closed"), str(moved)], check=True)
        answer = simple_calls.convert(daemon, moved / "disk.raw", merged / "out.raw", "raw")
        assert answer.reason == "OUTSIDE_ROOT"
        assert simple_calls.overwrite(daemon, merged / "own.raw", merged / "out.raw").is_ok
        daemon.stop()


def test_nested_root_in_a_snapshot_stays_closed(scratch: Path, make_daemon: MakeDaemon) -> None:
    """On btrfs whoever owns a subvolume can make one. A root that is a snapshot can be granted."""
    with Mounts(scratch) as mounts:
        btrfs = mounts.on_a_loop("btrfs", "btrfs")
        outer = btrfs / "outer"
        subvolume = ["btrfs", "--quiet", "subvolume"]
        subprocess.run([*subvolume, "create", str(outer)], check=True)
        (outer / "closed").mkdir(mode=0o700)
        os.chown(outer / "closed", BOB.uid, BOB.gid)
        os.chown(outer, ALICE.uid, ALICE.gid)
        simple_calls.file_of(BOB, outer / "closed" / "disk.raw", MARKER)
        simple_calls.file_of(ALICE, outer / "own.raw", b"x" * forged.SIZE)
        granted = btrfs / "granted"
        subprocess.run([*subvolume, "snapshot", str(outer), str(granted)], check=True)
        policy = granting(
            dataclasses.replace(GRANTED, path=str(granted)),
            outer=dataclasses.replace(OUTER, path=str(outer)),
            closed=dataclasses.replace(CLOSED, path=str(outer / "closed")),
        )
        daemon = make_daemon(policy)
        daemon.start()
        as_alice = ["setpriv", f"--reuid={ALICE.uid}", f"--regid={ALICE.gid}", "--clear-groups"]
        snapshot = outer / "snapshot"
        subprocess.run([*as_alice, *subvolume, "snapshot", str(outer), str(snapshot)], check=True)
        for copy in (snapshot, granted):
            answer = simple_calls.convert(
                daemon, copy / "closed" / "disk.raw", outer / "out.raw", "raw"
            )
            assert answer.reason == "OUTSIDE_ROOT"
        out = outer / "out.raw"
        assert simple_calls.convert(daemon, snapshot / "own.raw", out, "raw").is_ok
        assert simple_calls.convert(daemon, granted / "own.raw", outer / "out-2.raw", "raw").is_ok
        daemon.stop()


def test_nested_root_moved_to_the_path_of_another_root_stays_closed(
    scratch: Path, outer: Path, make_daemon: MakeDaemon
) -> None:
    """Whoever owns the parent of both puts the one where the other was."""
    granted = outer / "granted"
    granted.mkdir()
    daemon = make_daemon(granting(GRANTED))
    daemon.start()
    granted.rename(outer / "aside")
    (outer / "closed").rename(granted)
    answer = simple_calls.convert(daemon, granted / "disk.raw", outer / "out.raw", "raw")
    assert answer.reason == "OUTSIDE_ROOT"
    assert scratch.is_dir()


def test_one_directory_bind_mounted_twice_is_two_roots(
    outer: Path, make_daemon: MakeDaemon
) -> None:
    """Root mounted it twice, and so they were when the policy was loaded."""
    with Mounts(outer) as mounts:
        granted = mounts.bound(outer / "closed", "granted")
        daemon = make_daemon(granting(GRANTED))
        daemon.start()
        assert simple_calls.convert(daemon, granted / "disk.raw", outer / "out.raw", "raw").is_ok
        daemon.stop()


@pytest.fixture
def without_case(scratch: Path) -> Iterator[Path]:
    """A file system to which CLOSED is closed: an NTFS, with an image in `closed`."""
    image, point = scratch / "ntfs.img", scratch / "nt"
    with image.open("wb") as file:
        file.truncate(32 * 1024 * 1024)
    subprocess.run(["mkfs.ntfs", "-q", "-F", str(image)], check=True, capture_output=True)
    point.mkdir()
    argv = ["lowntfs-3g", "-o", "ignore_case,uid=0,gid=0,umask=022", str(image), str(point)]
    subprocess.run(argv, check=True)
    (point / "closed").mkdir()
    (point / "closed" / "disk.raw").write_bytes((MARKER * forged.SIZE)[: forged.SIZE])
    (point / "open").mkdir()
    images.small(point / "open" / "disk.raw")
    yield point
    subprocess.run(["umount", str(point)], check=True)


def test_nested_root_is_closed_in_each_spelling_that_the_file_system_accepts(
    outer: Path, without_case: Path, make_daemon: MakeDaemon
) -> None:
    """Where a file system takes capital letters for small ones."""
    nested = dataclasses.replace(CLOSED, path="{scratch}/nt/closed")
    daemon = make_daemon(granting(Root("nt", "{scratch}/nt"), closed=nested))
    daemon.start()
    for name in ("CLOSED", "Closed"):
        source = without_case / name / "disk.raw"
        assert source.exists()
        answer = simple_calls.convert(daemon, source, outer / "out.raw", "raw")
        assert answer.reason == "OUTSIDE_ROOT"
    spelt = without_case / "OPEN" / "disk.raw"
    assert simple_calls.convert(daemon, spelt, outer / "out.raw", "raw").is_ok
    daemon.stop()


def test_file_that_its_owner_moves_into_a_root_is_in_the_root(daemon: Daemon, outer: Path) -> None:
    """As docs/policy.md says: rename(2) asks about two directories, and never about the file."""
    home = outer.with_name("home-of-alice")
    home.mkdir()
    os.chown(home, ALICE.uid, ALICE.gid)
    (home / "roots.raw").write_bytes(b"r" * forged.SIZE)
    (home / "roots.raw").chmod(0o600)
    moved = ALICE.run(["mv", str(home / "roots.raw"), str(outer)])
    assert moved.status == 0
    assert simple_calls.convert(daemon, outer / "roots.raw", outer / "out.raw", "raw").is_ok
    home.rmdir()
