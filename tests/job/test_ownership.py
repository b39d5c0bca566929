"""What fchown(2) and fchmod(2) did is read back: not every file system does what it says."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import grants
import pytest
import refusals
import whole_job
from harness.mounts import Mounts

from convertd_core import values
from convertd_daemon.job import local_grant
from convertd_daemon.job.files import file_dest, ownership, paths

CALLER = grants.CALLER
SETUP = whole_job.setup()

UNKEPT = {
    "chmod-ignored": ("--chmod-ignore",),
    "chown-ignored": ("--chown-ignore",),
    "chown-denied": ("--chown-deny",),
    "chmod-denied": ("--chmod-deny",),
    "one-owner-for-all": ("--force-user=nobody", "--chown-ignore"),
    "one-mode-for-all": ("--perms=0644:a+X", "--chmod-ignore"),
}
"""File systems, as bindfs(1) can be each of them."""


def grant_to(directory: Path, **changes: object) -> values.ConvertGrant:
    """Leave to write the file `new` there."""
    rules = grants.Rules(roots=(grants.files(directory, **changes),))
    return rules.convert(grants.request(directory / "x", directory / "new"))


@contextlib.contextmanager
def created(grant: values.ConvertGrant) -> Iterator[file_dest.FileDest]:
    """A result that is being written."""
    with paths.open_target(grant) as target, file_dest.create(grant, target, SETUP) as dest:
        yield dest


@pytest.fixture(params=UNKEPT)
def unkept(request: pytest.FixtureRequest, area: Path, mounts: Mounts) -> Path:
    """A directory on a file system that does not keep an owner or a mode."""
    (area / "below").mkdir()
    return mounts.by_fuse(area / "below", "fuse", *UNKEPT[request.param])


@pytest.fixture
def everybodys(area: Path, mounts: Mounts) -> Path:
    """A file system that gives everybody every right, and no file to anybody."""
    (area / "below").mkdir()
    options = ("--perms=a+rwX", "--chown-ignore", "--chgrp-ignore", "--chmod-ignore")
    return mounts.by_fuse(area / "below", "fuse", *options)


def test_file_system_that_keeps_other_owners_or_modes_is_refused(unkept: Path) -> None:
    """Whether it says so or not; nothing is left there."""
    failure = refusals.refusal_of(lambda: created(grant_to(unkept)).__enter__())
    assert failure is not None
    assert failure.reason == "OWNER_NOT_KEPT"
    assert dict(failure.values)["wanted"] == "uid 1234, gid 1234, mode 0600"
    assert os.listdir(unkept) == []


def test_fuse_file_system_that_keeps_owners_and_modes_is_accepted(
    area: Path, mounts: Mounts
) -> None:
    """The control: FUSE alone is no reason."""
    (area / "below").mkdir()
    with created(grant_to(mounts.by_fuse(area / "below", "fuse"))) as dest:
        assert ownership.settle(dest.fd, dest.ownership, dest.target) == ()


def test_file_system_that_ignores_owners_is_used_with_a_warning_if_allowed(
    everybodys: Path,
) -> None:
    """In the result's warnings."""
    with created(grant_to(everybodys, allow_ownerless=True)) as dest:
        (warning,) = ownership.settle(dest.fd, dest.ownership, dest.target)
    assert warning.reason == "OWNER_NOT_KEPT"
    assert "uid 0, gid 0, mode 0666, not uid 1234, gid 1234, mode 0600" in warning.message


def test_file_system_where_the_worker_can_not_write_is_refused(area: Path, mounts: Mounts) -> None:
    """It would fail in the middle, and say something else."""
    (area / "below").mkdir()
    place = mounts.by_fuse(area / "below", "fuse", "--perms=0644:a+X", "--chmod-ignore")
    grant = grant_to(place, allow_ownerless=True)
    failure = refusals.refusal_of(lambda: created(grant).__enter__())
    assert failure is not None
    assert failure.reason == "UNSUPPORTED"
    assert f"does not let qemu-img's uid {whole_job.WORKER.uid} write it" in failure.message
    assert os.listdir(place) == []


def test_owner_lost_at_the_end_is_detected_before_the_result_is_published(
    area: Path, mounts: Mounts
) -> None:
    """Another mode than the one while it is written can be one that is not kept."""
    (area / "below").mkdir()
    place = mounts.by_fuse(area / "below", "fuse", "--chmod-filter=o-r")
    rules = grants.Rules(roots=(grants.files(place),))
    asked = grants.to(grants.request(place / "x", place / "new"), mode=0o644)
    grant = rules.convert(asked)
    with created(grant) as dest:
        reason = refusals.reason_of(lambda: ownership.settle(dest.fd, dest.ownership, dest.target))
    assert reason == "OWNER_NOT_KEPT"
    assert os.listdir(place) == []


def test_local_conversion_warns_about_an_owner_that_was_not_kept(everybodys: Path) -> None:
    """Whoever converts with its own rights chose the file system."""
    grant = dataclasses.replace(
        grant_to(everybodys),
        dest=values.Place(root=local_grant.EVERYTHING, below=f"{everybodys}/new"[1:]),
        peer=dataclasses.replace(CALLER, uid=0, gid=0),
    )
    alone = dataclasses.replace(SETUP, identity=None)
    with paths.open_target(grant) as target, file_dest.create(grant, target, alone) as dest:
        (warning,) = ownership.settle(dest.fd, dest.ownership, dest.target)
    assert warning.reason == "OWNER_NOT_KEPT"


def test_stale_temporary_is_removed_where_the_file_system_ignores_owners(everybodys: Path) -> None:
    """It belongs to whom the next one belongs: to all alike."""
    (everybodys / ".convertd-0123456789abcdef.tmp").touch()
    with created(grant_to(everybodys, allow_ownerless=True)) as dest:
        assert os.listdir(everybodys) == [dest.temporary]
