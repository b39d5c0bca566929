"""The file with the counters: in whosever directory it is, nothing there misleads or stops us."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path
from typing import Final

import pytest
from harness.callers import ALICE, MALLORY, owner_of
from harness.daemon import Daemon
from harness.fixtures import MakeDaemon
from hostile import unresponsive_fuse
from policies import Policy

from convertd_daemon.service import counters_file

POLICY: Final = Policy(service={"metrics": "{scratch}/theirs/export/convertd.prom"})


@pytest.fixture
def export(scratch: Path) -> Path:
    """Mallory's directory, empty, in another of hers."""
    theirs = scratch / "theirs"
    directory = theirs / "export"
    directory.mkdir(parents=True, exist_ok=True)
    for one in (theirs, directory):
        os.chown(one, MALLORY.uid, MALLORY.gid)
    for found in directory.iterdir():
        found.unlink()
    return directory


@pytest.fixture
def daemon(make_daemon: MakeDaemon, export: Path) -> Daemon:
    """One that writes there, not started yet."""
    assert export.is_dir()
    return make_daemon(POLICY)


def await_written(daemon: Daemon, file: Path) -> None:
    """End the daemon, which writes the file a last time, and see that it is whole and alone."""
    daemon.stop()
    assert file.read_text().startswith("# HELP convertd_start_time_seconds")
    assert owner_of(file) == (0, 0, 0o644)


def test_counters_file_is_readable_by_everybody(daemon: Daemon, export: Path) -> None:
    """And nothing lies beside it."""
    daemon.start()
    await_written(daemon, export / "convertd.prom")
    assert os.listdir(export) == ["convertd.prom"]


def test_fifo_at_a_predictable_temporary_name_does_not_block_the_counters(
    daemon: Daemon, export: Path
) -> None:
    """Whose opening for writing waits until somebody reads: the name of the file and our pid."""
    daemon.start()
    os.mkfifo(export / f"convertd.prom.{daemon.pid}", 0o666)
    await_written(daemon, export / "convertd.prom")


@pytest.mark.parametrize("kind", ["fifo", "link", "file"])
def test_object_at_the_counters_path_is_replaced_and_not_opened(
    daemon: Daemon, export: Path, scratch: Path, kind: str
) -> None:
    """Whosever it is, and wherever it leads."""
    file, victim = export / "convertd.prom", scratch / "victim"
    victim.write_text("precious")
    match kind:
        case "fifo":
            os.mkfifo(file, 0o666)
        case "link":
            file.symlink_to(victim)
        case "file":
            file.write_text("theirs")
            os.chown(file, MALLORY.uid, MALLORY.gid)
    daemon.start()
    await_written(daemon, file)
    assert not file.is_symlink()
    assert victim.read_text() == "precious"


def test_directory_at_the_counters_path_is_kept_and_reported(daemon: Daemon, export: Path) -> None:
    """Nothing is left of what could not be put there."""
    (export / "convertd.prom").mkdir()
    daemon.start()
    daemon.await_logged("can't write counters")
    daemon.stop()
    assert os.listdir(export) == ["convertd.prom"]
    (export / "convertd.prom").rmdir()


@pytest.mark.parametrize("level", ["the directory", "the one above"])
def test_symlink_in_the_path_is_not_followed(
    daemon: Daemon, export: Path, scratch: Path, level: str
) -> None:
    """What is root's alone to write stays empty."""
    closed = scratch / "closed"
    (closed / "export").mkdir(parents=True, exist_ok=True)
    moved = export if level == "the directory" else export.parent
    away = moved.with_name("away")
    moved.rename(away)
    moved.symlink_to(closed / "export" if moved == export else closed)
    daemon.start()
    daemon.await_logged("Too many levels of symbolic links")
    daemon.stop()
    moved.unlink()
    away.rename(moved)
    assert os.listdir(closed / "export") == []


def test_unresponsive_counters_file_system_does_not_block_the_daemon(
    daemon: Daemon, export: Path, scratch: Path
) -> None:
    """Whoever writes there waits; callers are answered, and the daemon ends."""
    assert scratch.is_dir()
    with unresponsive_fuse.mounted(export) as asked:
        daemon.start()
        assert asked.read(1)
        assert daemon.agent(ALICE).access().uid == ALICE.uid
        unresponsive_fuse.unmount(export)
    daemon.stop()


def test_stale_counters_temporary_is_removed_and_nothing_else(daemon: Daemon, export: Path) -> None:
    """Old, of exactly that name, and root's."""
    left = export / f".convertd-counters-{'0f' * 8}.tmp"
    new = export / f".convertd-counters-{'1f' * 8}.tmp"
    theirs = export / f".convertd-counters-{'2f' * 8}.tmp"
    other = export / ".convertd-counters-x.tmp"
    for path in (left, new, theirs, other):
        path.touch()
    os.chown(theirs, MALLORY.uid, MALLORY.gid)
    for path in (left, theirs, other):
        os.utime(path, (time.time() - 3600,) * 2)
    daemon.start()
    await_written(daemon, export / "convertd.prom")
    assert {*export.iterdir()} == {export / "convertd.prom", new, theirs, other}


def test_directory_with_many_names_uses_no_memory_of_root(export: Path) -> None:
    """Every 15 s a process of root's looks for what a killed daemon left."""
    for number in range(20_000):
        (export / f".convertd-counters-{number:016x}.tmp").touch()
    tracemalloc.start()
    try:
        counters_file.write(str(export / "convertd.prom"), b"counters 1\n")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (export / "convertd.prom").read_bytes() == b"counters 1\n"
    assert peak_bytes < 1024 * 1024
