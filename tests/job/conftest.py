"""What the tests of a job's steps share: places on real file systems, and rights that come back."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.mounts import Mounts

from convertd_daemon.linux import prctl


@pytest.fixture
def area() -> Iterator[Path]:
    """A directory of root's that everybody can reach, on the machine's own file system."""
    with tempfile.TemporaryDirectory(dir="/var/lib", prefix="convertd-test-job-") as made:
        path = Path(made)
        path.chmod(0o755)
        yield path


@pytest.fixture
def mounts(area: Path) -> Iterator[Mounts]:
    """File systems, mounted in `area`."""
    with Mounts(area) as made:
        yield made


@pytest.fixture(scope="module")
def shared_area() -> Iterator[Path]:
    """A directory as `area`, for the tests of a module together."""
    path = Path(tempfile.mkdtemp(dir="/var/lib", prefix="convertd-test-job-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def rights_come_back() -> Iterator[None]:
    """See that a test leaves this process as it was: its own rights, no parent-death signal."""
    yield
    # A job dies with its parent; this process is no job.
    prctl.set_pdeathsig(0)
    with open("/proc/self/status", encoding="utf-8") as lines:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in lines if ":\t" in line)
    assert status["Uid"].split() == status["Gid"].split() == ["0"] * 4
    assert {int(group) for group in status["Groups"].split()} == set(os.getgroups())
