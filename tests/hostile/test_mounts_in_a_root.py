"""What a user mounted in a root: a FUSE file system can hold whoever touches it in state D."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Final

import pytest
from harness import processes, waiting
from harness.callers import ALICE
from harness.daemon import Daemon
from hostile import simple_calls, unresponsive_fuse
from policies import IMAGES, Grant, Policy

POLICY: Final = Policy(grants=[Grant(read=[IMAGES], write=[IMAGES])])

AT_ONCE_S: Final = 60.0
"""Far less than anybody who waits for an unresponsive file system would take."""


@pytest.fixture
def own_dir(images_dir: Path) -> Path:
    """A directory of the caller's, with a source and a former result in it."""
    os.chown(images_dir, ALICE.uid, ALICE.gid)
    simple_calls.file_of(ALICE, images_dir / "image.raw", b"x" * 65536)
    simple_calls.file_of(ALICE, images_dir / "out.raw", b"old")
    (images_dir / "directory").mkdir()
    return images_dir


@pytest.mark.parametrize(
    ("point", "source", "dest"),
    [
        ("directory", "directory/image.raw", "new.raw"),
        ("directory", "image.raw", "directory/new.raw"),
        ("directory", "image.raw", "directory"),
        ("image.raw", "image.raw", "new.raw"),
        ("out.raw", "image.raw", "out.raw"),
    ],
    ids=["below a source", "below a result", "in place of a result", "a source", "a result"],
)
def test_unresponsive_fuse_mount_in_a_root_blocks_no_job(
    daemon: Daemon, own_dir: Path, point: str, source: str, dest: str
) -> None:
    """It is not entered, so it is not asked."""
    began = time.monotonic()
    with unresponsive_fuse.mounted(own_dir / point):
        answer = simple_calls.overwrite(daemon, own_dir / source, own_dir / dest)
        assert answer.reason == "OUTSIDE_ROOT"
        assert time.monotonic() - began < AT_ONCE_S
        daemon.await_idle()


def test_unresponsive_fuse_mount_named_as_a_temporary_blocks_no_overwrite(
    daemon: Daemon, own_dir: Path
) -> None:
    """Whoever overwrites looks through the directory for what a killed job left."""
    left_over = simple_calls.file_of(ALICE, own_dir / ".convertd-0123456789abcdef.tmp", b"")
    other = simple_calls.file_of(ALICE, own_dir / ".convertd-fedcba9876543210.tmp", b"")
    began = time.monotonic()
    with unresponsive_fuse.mounted(left_over):
        assert simple_calls.overwrite(daemon, own_dir / "image.raw", own_dir / "out.raw").is_ok
        assert time.monotonic() - began < AT_ONCE_S
        daemon.await_idle()
    assert left_over.exists()
    assert not other.exists()


def test_control_unresponsive_fuse_mount_blocks_a_process_that_opens_it(own_dir: Path) -> None:
    """The control: without it the others would show nothing. Not even SIGKILL ends the wait."""
    point = own_dir / "directory"
    argv = ["stat", str(point)]
    with (
        unresponsive_fuse.mounted(point) as asked,
        subprocess.Popen(argv, stderr=subprocess.DEVNULL) as asking_it,
    ):
        assert asked.read(1)
        asking_it.kill()
        waiting.until(lambda: processes.state(asking_it.pid) == "D", "stat can't be killed")
        unresponsive_fuse.unmount(point)
