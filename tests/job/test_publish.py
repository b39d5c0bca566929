"""The result's name: all of it, on disk, or none of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grants
import moments
import pytest
import refusals
import whole_job
from harness.mounts import Mounts

from convertd_core import conditions, values
from convertd_daemon.job import local_grant
from convertd_daemon.job.files import (
    device_dest,
    file_dest,
    paths,
    publish,
    replace,
)

CALLER = grants.CALLER
OTHER_USER = grants.OTHER_USER
SETUP = whole_job.setup()

NEW, OLD, THEIRS = b"the result", b"the old file", b"somebody else's"


def grant_to(
    directory: Path,
    *,
    overwrite: values.OverwriteScope | None = None,
    root: values.Root | None = None,
    **asked: object,
) -> values.ConvertGrant:
    """Leave to write the file `new` there, and to overwrite whose it may."""
    rules = grants.Rules(
        roots=(root or grants.files(directory),), overwrite=overwrite or values.OverwriteScope.OWN
    )
    request = grants.request(directory / "never-read", directory / "new")
    return rules.convert(grants.to(request, overwrite=overwrite is not None, **asked))


@contextlib.contextmanager
def written(grant: values.ConvertGrant) -> Iterator[file_dest.FileDest]:
    """A result that is written, and flushed, but has no name."""
    with paths.open_target(grant) as target, file_dest.create(grant, target, SETUP) as dest:
        os.write(dest.fd, NEW)
        publish.flush(dest)
        yield dest


def put(path: Path, data: bytes, owner: int = CALLER.uid) -> Path:
    """Put a file there."""
    path.write_bytes(data)
    os.chown(path, owner, owner)
    return path


def published(grant: values.ConvertGrant, meanwhile: Callable[[], object] = lambda: None) -> str:
    """What becomes of a result if something happens between its flushing and its naming."""
    with written(grant) as dest:
        meanwhile()
        return refusals.reason_of(lambda: publish.assign_name(grant, dest))


def names_in(directory: Path) -> set[str]:
    """All names there, ours for the moment too.

    But for what libfuse calls an open file that was unlinked, until it is closed.
    """
    return {name for name in os.listdir(directory) if not name.startswith(".fuse_hidden")}


@pytest.fixture(params=["unnamed", "named"])
def place(request: pytest.FixtureRequest, area: Path) -> Iterator[Path]:
    """A directory on a file system with O_TMPFILE, and on one without."""
    directory = area / "below"
    directory.mkdir()
    if request.param == "unnamed":
        directory.chmod(0o777)
        yield directory
        return
    # Nobody but root may write there: without an exchange of names nothing else would be safe.
    with Mounts(area) as mounts:
        yield mounts.by_fuse(directory, "fuse")


class TestNewFile:
    """A name that is free."""

    def test_published_name_leads_to_the_whole_result(self, place: Path) -> None:
        """And to nothing before; nothing else is left."""
        with written(grant_to(place)) as dest:
            assert "new" not in names_in(place)
            assert publish.assign_name(grant_to(place), dest) is False
            assert names_in(place) == {"new"}
        assert (place / "new").read_bytes() == NEW
        assert os.listdir(place) == ["new"]

    def test_published_file_has_the_requested_owner_and_mode(self, place: Path) -> None:
        """Set before the name is."""
        published(grant_to(place, mode=0o640, group="1300"))
        status = (place / "new").stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (CALLER.uid, 1300, 0o640)

    def test_name_taken_by_another_file_during_the_job_is_not_replaced(self, place: Path) -> None:
        """Whose file it is does not matter: overwriting was not asked for."""
        reason = published(grant_to(place), lambda: put(place / "new", THEIRS))
        assert reason == "DEST_EXISTS"
        assert (place / "new").read_bytes() == THEIRS
        assert names_in(place) == {"new"}

    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(lambda path: path.symlink_to("/nowhere"), id="a-link-that-leads-nowhere"),
            pytest.param(lambda path: path.symlink_to("elsewhere"), id="a-link-to-a-file"),
            pytest.param(Path.mkdir, id="a-directory"),
        ],
    )
    def test_name_taken_by_a_symlink_during_the_job_is_not_followed(
        self, area: Path, make: Callable[[Path], object]
    ) -> None:
        """Linkat(2) creates, and never goes through what is there."""
        put(area / "elsewhere", THEIRS)
        assert published(grant_to(area), lambda: make(area / "new")) == "DEST_EXISTS"
        assert (area / "elsewhere").read_bytes() == THEIRS
        assert not os.path.lexists("/nowhere")

    def test_publishing_in_a_removed_directory_is_reported(self, area: Path) -> None:
        """And that is said."""
        directory = area / "removed"
        directory.mkdir()
        assert published(grant_to(directory), directory.rmdir) == "DIRECTORY_NOT_FOUND"

    def test_publishing_in_a_renamed_directory_succeeds(self, area: Path) -> None:
        """The descriptor of it is what counts."""
        directory = area / "before"
        directory.mkdir()
        assert published(grant_to(directory), lambda: directory.rename(area / "after")) == "done"
        assert (area / "after" / "new").read_bytes() == NEW


class TestOverwriting:
    """A name that leads to an old file."""

    @pytest.mark.parametrize("overwrite", values.OverwriteScope)
    def test_overwriting_replaces_the_file_atomically(
        self, place: Path, overwrite: values.OverwriteScope
    ) -> None:
        """Whoever has the old one open keeps it whole."""
        put(place / "new", OLD)
        grant = grant_to(place, overwrite=overwrite)
        with (place / "new").open("rb") as reader, written(grant) as dest:
            assert (place / "new").read_bytes() == OLD
            assert publish.assign_name(grant, dest) is True
            assert reader.read() == OLD
        assert (place / "new").read_bytes() == NEW
        assert names_in(place) == {"new"}

    def test_overwriting_of_a_missing_file_creates_it(self, place: Path) -> None:
        """To ask for it is no duty."""
        grant = grant_to(place, overwrite=values.OverwriteScope.OWN)
        with written(grant) as dest:
            assert publish.assign_name(grant, dest) is False

    @pytest.mark.parametrize("uid", [OTHER_USER.uid, 0])
    def test_overwriting_refuses_a_file_put_there_by_another_user_during_the_job(
        self, place: Path, uid: int
    ) -> None:
        """It was the caller's own when it was allowed."""
        put(place / "new", OLD)
        grant = grant_to(place, overwrite=values.OverwriteScope.OWN)
        reason = published(grant, lambda: put(place / "theirs", THEIRS, uid).rename(place / "new"))
        assert reason == "NOT_YOURS"
        assert (place / "new").read_bytes() == THEIRS
        assert names_in(place) == {"new"}

    def test_overwriting_any_file_is_done_if_the_policy_allows_it(self, place: Path) -> None:
        """Also of one that came meanwhile."""
        grant = grant_to(place, overwrite=values.OverwriteScope.ANY)
        assert published(grant, lambda: put(place / "new", THEIRS, OTHER_USER.uid)) == "done"
        assert (place / "new").read_bytes() == NEW

    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(lambda path: path.symlink_to("elsewhere"), id="a-link"),
            pytest.param(Path.mkdir, id="a-directory"),
            pytest.param(os.mkfifo, id="a-fifo"),
        ],
    )
    def test_overwriting_refuses_what_is_not_a_regular_file(
        self, place: Path, make: Callable[[Path], object]
    ) -> None:
        """Whatever it was when it was looked at first."""
        grant = grant_to(place, overwrite=values.OverwriteScope.ANY)
        before = names_in(place)
        assert published(grant, lambda: make(place / "new")) == "DEST_EXISTS"
        assert names_in(place) == before | {"new"}

    def test_overwriting_refuses_a_mount_point(self, area: Path) -> None:
        """What is mounted on the file is not entered, nor is it taken away."""
        put(area / "new", OLD)
        put(area / "other", THEIRS)
        mount = ["mount", "--bind", str(area / "other"), str(area / "new")]
        grant = grant_to(area, overwrite=values.OverwriteScope.ANY)
        try:
            with written(grant) as dest:
                subprocess.run(mount, check=True)
                reason = refusals.reason_of(lambda: publish.assign_name(grant, dest))
        finally:
            subprocess.run(["umount", str(area / "new")], check=True)
        assert reason == "WRITE_FAILED"
        assert (area / "new").read_bytes() == OLD
        assert names_in(area) == {"new", "other"}

    def test_overwriting_in_a_sticky_directory_is_decided_by_the_kernel(self, area: Path) -> None:
        """The policy would allow it, the caller's rights do not."""
        area.chmod(0o1777)
        put(area / "new", THEIRS, OTHER_USER.uid)
        (area / "new").chmod(0o644)
        root = grants.files(area, access=values.RootAccess.CALLER)
        grant = grant_to(area, root=root, overwrite=values.OverwriteScope.ANY)
        assert published(grant) == "ACCESS_REFUSED"
        assert (area / "new").read_bytes() == THEIRS
        assert names_in(area) == {"new"}

    def test_overwriting_removes_temporaries_of_killed_jobs(self, area: Path) -> None:
        """A kill between link and rename leaves a complete temporary."""
        put(area / "new", OLD)
        put(area / ".convertd-0123456789abcdef.tmp", NEW)
        assert published(grant_to(area, overwrite=values.OverwriteScope.OWN)) == "done"
        assert names_in(area) == {"new"}


def outcome_after(grant: values.ConvertGrant, act: moments.Act) -> str:
    """What becomes of a result if another process acts right after it got its name."""
    with written(grant) as dest, moments.after(replace, "take_name", act):
        return refusals.reason_of(lambda: publish.assign_name(grant, dest))


def run(argv: list[str]) -> None:
    """Run a program."""
    subprocess.run(argv, check=True)


class TestCheckAfterPublishing:
    """A name that was given is looked at once more."""

    def test_result_replaced_right_after_publishing_is_not_reported_as_success(
        self, area: Path
    ) -> None:
        """Somebody else's file is at the name. The caller must not take it for its own."""
        replaced = functools.partial(
            put(area / "theirs", THEIRS, OTHER_USER.uid).rename, area / "new"
        )
        assert outcome_after(grant_to(area), replaced) == "NAME_REPLACED"

    def test_result_removed_right_after_publishing_is_not_reported_as_success(
        self, area: Path
    ) -> None:
        """There is nothing at the name."""
        assert outcome_after(grant_to(area), (area / "new").unlink) == "NAME_REPLACED"

    def test_result_hidden_by_a_mount_after_publishing_is_not_reported_as_success(
        self, area: Path
    ) -> None:
        """What is mounted there is not entered."""
        put(area / "other", THEIRS)
        point = str(area / "new")
        hide = ["mount", "--bind", str(area / "other"), point]
        try:
            assert outcome_after(grant_to(area), lambda: run(hide)) == "NAME_REPLACED"
        finally:
            run(["umount", point])

    def test_swapped_temporary_is_not_published_as_the_result(
        self, area: Path, mounts: Mounts
    ) -> None:
        """Whoever may write the directory may put another file in the place of a named one."""
        (area / "below").mkdir()
        fuse = mounts.by_fuse(area / "below", "fuse")
        with written(grant_to(fuse)) as dest:
            put(fuse / dest.temporary, THEIRS).rename(fuse / "aside")
            put(fuse / dest.temporary, THEIRS)
            reason = refusals.reason_of(lambda: publish.assign_name(grant_to(fuse), dest))
        assert reason == "NAME_REPLACED"

    def test_failed_directory_fsync_reports_the_result_as_not_durable(self, area: Path) -> None:
        """Fsync(2) of the directory fails; here, for it is open as a mere path."""
        grant = grant_to(area)
        with written(grant) as dest:
            path = os.open(area, os.O_PATH | os.O_DIRECTORY)
            weak = dataclasses.replace(dest.target, directory=path)
            failure = refusals.refusal_of(
                lambda: publish.assign_name(grant, dataclasses.replace(dest, target=weak))
            )
            os.close(path)
        assert failure is not None
        assert failure.reason == "PUBLISHED_BUT_NOT_DURABLE"
        assert "Bad file descriptor" in failure.message
        assert (area / "new").read_bytes() == NEW

    def test_published_name_that_can_not_be_checked_is_not_reported_as_durable(
        self, area: Path, mounts: Mounts
    ) -> None:
        """A file system that went away: it may or may not be there."""
        (area / "below").mkdir()
        fuse = mounts.by_fuse(area / "below", "fuse")
        try:
            unmount = ["umount", "--lazy", "--force", str(fuse)]
            outcome = outcome_after(grant_to(fuse), lambda: run(unmount))
        finally:
            run(["bindfs", str(area / "below"), str(fuse)])
        assert outcome == "PUBLISHED_BUT_NOT_DURABLE"


class TestFailedPublishing:
    """What can't be flushed or named leaves nothing."""

    def test_result_that_can_not_be_flushed_is_not_published(self, area: Path) -> None:
        """In the kernel's words; here a pipe, which can't be."""
        grant = grant_to(area)
        reader, writer = os.pipe()
        with paths.open_target(grant) as target, file_dest.create(grant, target, SETUP) as dest:
            broken = dataclasses.replace(dest, fd=writer)
            failure = refusals.refusal_of(lambda: publish.flush(broken))
        os.close(reader)
        os.close(writer)
        assert failure is not None
        assert failure.reason == "WRITE_FAILED"
        assert "Invalid argument" in failure.message

    def test_failed_link_is_reported_and_publishes_nothing(
        self, area: Path, mounts: Mounts
    ) -> None:
        """Another file system's, here: nothing is visible in either."""
        other = mounts.in_memory("tmpfs", "other")
        grant = grant_to(area)
        with written(grant) as dest:
            directory = os.open(other, os.O_RDONLY | os.O_DIRECTORY)
            moved = dataclasses.replace(dest.target, directory=directory)
            failure = refusals.refusal_of(
                lambda: publish.assign_name(grant, dataclasses.replace(dest, target=moved))
            )
            os.close(directory)
        assert failure is not None
        assert failure.reason == "WRITE_FAILED"
        assert "cross-device" in failure.message
        assert names_in(other) == set()
        assert names_in(area) == {"other"}


class TestLocalGrants:
    """Without a daemon."""

    def test_local_publishing_leaves_the_group_from_the_directory(self, area: Path) -> None:
        """Nobody may chown who is not root; nothing is asked of the kernel that need not be."""
        grant = dataclasses.replace(
            grant_to(area), dest=values.Place(root=local_grant.EVERYTHING, below=f"{area}/new"[1:])
        )
        peer = dataclasses.replace(CALLER, uid=0, gid=0)
        grant = dataclasses.replace(grant, peer=peer)
        setup = dataclasses.replace(SETUP, identity=None)
        with paths.open_target(grant) as target, file_dest.create(grant, target, setup) as dest:
            os.fchown(dest.fd, -1, 1400)
            publish.flush(dest)
            publish.assign_name(grant, dest)
        assert (area / "new").stat().st_gid == 1400

    @pytest.mark.parametrize("asked", [{}, {"group": "0"}], ids=["no-group", "the-same-group"])
    def test_publishing_does_not_chown_to_the_current_owner(
        self, area: Path, mounts: Mounts, asked: dict[str, Any]
    ) -> None:
        """Some file systems give nothing to anybody, not even to whom it belongs."""
        (area / "below").mkdir()
        point = mounts.by_fuse(area / "below", "fuse", "--chown-deny")
        grant = dataclasses.replace(
            grant_to(area, **asked),
            dest=values.Place(root=local_grant.EVERYTHING, below=f"{point}/new"[1:]),
            peer=dataclasses.replace(CALLER, uid=0, gid=0),
        )
        setup = dataclasses.replace(SETUP, identity=None)
        with paths.open_target(grant) as target, file_dest.create(grant, target, setup) as dest:
            publish.flush(dest)
            publish.assign_name(grant, dest)
        assert os.listdir(point) == ["new"]


def test_publishing_a_device_changes_no_name(area: Path) -> None:
    """There is nothing to be given; and something was there before, as there always is."""
    place = values.Place(root=grants.devices("/dev/vg"), below="lv")
    device = device_dest.DeviceDest(place=place, fd=-1, size_bytes=0, group=None)
    assert device.assign_name(grant_to(area)) is True
    assert names_in(area) == set()


def test_publishing_error_has_the_path_of_the_caller(area: Path) -> None:
    """And no name of ours."""
    grant = grant_to(area)
    with written(grant) as dest:
        put(area / "new", THEIRS)
        with pytest.raises(conditions.DestExists, match=f"^{area}/new: exists"):
            publish.assign_name(grant, dest)
