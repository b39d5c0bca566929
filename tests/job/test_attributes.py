"""chattr(1): append-only and immutable directories and files, asked before anything is written."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import failing
import grants
import pytest
import refusals
import whole_job
from harness.mounts import Mounts

from convertd_core import conditions, values
from convertd_daemon.job.files import file_dest, paths, publish

SETUP = whole_job.setup()


@contextlib.contextmanager
def having(path: Path, attribute: str) -> Iterator[None]:
    """A file or directory that has an attribute meanwhile."""
    subprocess.run(["chattr", f"+{attribute}", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["chattr", f"-{attribute}", str(path)], check=True)


def job(directory: Path, *, overwrite: bool) -> whole_job.JobEvents:
    """Convert `in` to `out`."""
    (directory / "in").write_bytes(os.urandom(65536))
    rules = grants.Rules(roots=(grants.files(directory),), overwrite=values.OverwriteScope.ANY)
    request = grants.request(directory / "in", directory / "out")
    return whole_job.run(rules.convert(grants.to(request, overwrite=overwrite)))


@pytest.fixture(params=["ext4", "xfs", "btrfs", "tmpfs"])
def disk(request: pytest.FixtureRequest, mounts: Mounts) -> Path:
    """A directory on a file system that has such attributes."""
    if request.param == "tmpfs":
        point = mounts.in_memory("tmpfs", "disk")
    else:
        point = mounts.on_a_loop(request.param, "disk", 64)
    (point / "below").mkdir()
    (point / "below" / "in").touch()
    return point / "below"


@pytest.mark.parametrize(
    ("what", "attribute", "named"),
    [
        pytest.param("", "a", "append-only", id="append-only-directory"),
        pytest.param("", "i", "immutable", id="immutable-directory"),
        pytest.param("out", "a", "append-only", id="append-only-file"),
        pytest.param("out", "i", "immutable", id="immutable-file"),
    ],
)
def test_destination_is_refused_before_anything_is_written_in_an(
    disk: Path, what: str, attribute: str, named: str
) -> None:
    """Nothing is left there, and the message says why."""
    (disk / "out").write_bytes(b"old")
    with having(disk / what, attribute):
        outcome = job(disk, overwrite=True)
        assert outcome.failure is not None
        assert outcome.failure.reason == "PROTECTED_BY_ATTRIBUTE"
        path = str(disk / what).rstrip("/")
        assert dict(outcome.failure.values) == {"path": path, "attribute": named}
        assert sorted(os.listdir(disk)) == ["in", "out"]
    assert (disk / "out").read_bytes() == b"old"


def test_new_result_is_created_in_an_append_only_directory(disk: Path) -> None:
    """That is what such a directory is for."""
    with having(disk, "a"):
        assert job(disk, overwrite=False).reason == "done"
        assert sorted(os.listdir(disk)) == ["in", "out"]


def test_directory_that_becomes_append_only_during_the_job_gets_no_temporary(area: Path) -> None:
    """It could not be taken away again."""
    (area / "new").write_bytes(b"old")
    rules = grants.Rules(roots=(grants.files(area),), overwrite=values.OverwriteScope.ANY)
    grant = rules.convert(grants.to(grants.request(area / "x", area / "new"), overwrite=True))
    with (
        paths.open_target(grant) as target,
        file_dest.create(grant, target, SETUP) as dest,
        having(area, "a"),
    ):
        reason = refusals.reason_of(lambda: publish.assign_name(grant, dest))
        assert os.listdir(area) == ["new"]
    assert reason == "PROTECTED_BY_ATTRIBUTE"


def test_append_only_directory_without_o_tmpfile_is_refused(
    area: Path,
) -> None:
    """The name could not be taken away. No file system here has attributes and no O_TMPFILE."""
    rules = grants.Rules(roots=(grants.files(area),))
    grant = rules.convert(grants.request(area / "x", area / "new"))
    with having(area, "a"), paths.open_target(grant) as target, failing.o_tmpfile("EOPNOTSUPP"):
        with (
            pytest.raises(conditions.ProtectedByAttribute),
            file_dest.create(grant, target, SETUP),
        ):
            pass
        assert os.listdir(area) == []
