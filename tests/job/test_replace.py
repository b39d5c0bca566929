"""Overwriting: what may not be replaced keeps its name, whatever happens at the last moment."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import grants
import moments
import pytest
import refusals
import whole_job
from harness.mounts import Mounts

from convertd_core import values
from convertd_daemon.job.files import (
    file_dest,
    ownership,
    paths,
    publish,
    replace,
    temporaries,
)
from convertd_daemon.linux.renameat2 import Flag, renameat2

CALLER = grants.CALLER
OTHER_USER = grants.OTHER_USER
SETUP = whole_job.setup()

WRITE_LOCK = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 101, 1, 0)
"""As qemu has on a disk that it writes."""

NEW, OLD, THEIRS = b"the result", b"the old file", b"somebody else's"


def grant_to(
    directory: Path,
    *,
    dest: str = "new",
    overwrite: values.OverwriteScope = values.OverwriteScope.OWN,
    access: values.RootAccess = values.RootAccess.DAEMON,
) -> values.ConvertGrant:
    """Leave to write a file there, over what may be replaced."""
    rules = grants.Rules(roots=(grants.files(directory, access=access),), overwrite=overwrite)
    request = grants.request(directory / "never-read", directory / dest)
    return rules.convert(grants.to(request, overwrite=True))


@contextlib.contextmanager
def written(grant: values.ConvertGrant) -> Iterator[file_dest.FileDest]:
    """A result that is written, with its owner, and that has no name."""
    with paths.open_target(grant) as target, file_dest.create(grant, target, SETUP) as dest:
        os.write(dest.fd, NEW)
        ownership.settle(dest.fd, dest.ownership, target)
        yield dest


def put(path: Path, data: bytes, owner: int = CALLER.uid) -> Path:
    """Put a file there."""
    path.write_bytes(data)
    path.chmod(0o600)
    os.chown(path, owner, owner)
    return path


def lock(disk: IO[bytes]) -> None:
    """Lock a file as qemu does."""
    fcntl.fcntl(disk, fcntl.F_OFD_SETLK, WRITE_LOCK)


def chattr(change: str, path: Path) -> None:
    """Change an attribute."""
    subprocess.run(["chattr", change, str(path)], check=True)


@pytest.fixture
def sticky(area: Path) -> Path:
    """A directory as /tmp, with an old file of the caller's."""
    area.chmod(0o1777)
    put(area / "new", OLD)
    return area


def outcome_of(grant: values.ConvertGrant, *acts: moments.Act | None) -> str:
    """What becomes of a result, if other processes act before each renaming in turn.

    The first is the exchange with the file that was just judged to be replaceable. If what came out
    may not be replaced, the second one gives it its name back.
    """
    with written(grant) as dest, moments.before(replace, "renameat2", *acts):
        return refusals.reason_of(lambda: publish.assign_name(grant, dest))


class TestExchange:
    """What came out is judged, and not what was there before."""

    def test_exchange_keeps_a_file_another_user_put_there_at_the_last_moment(
        self, sticky: Path
    ) -> None:
        """Its inode, its data, its owner."""
        theirs = put(sticky / "theirs", THEIRS, OTHER_USER.uid).stat()
        swap = functools.partial((sticky / "theirs").rename, sticky / "new")
        assert outcome_of(grant_to(sticky), swap, None) == "NOT_YOURS"
        assert os.path.samestat(theirs, (sticky / "new").stat())
        assert (sticky / "new").read_bytes() == THEIRS
        assert os.listdir(sticky) == ["new"]

    @pytest.mark.parametrize("overwrite", values.OverwriteScope)
    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(lambda path: path.symlink_to("elsewhere"), id="a-link"),
            pytest.param(Path.mkdir, id="a-directory"),
            pytest.param(os.mkfifo, id="a-fifo"),
        ],
    )
    def test_exchange_keeps_an_object_that_is_not_a_regular_file(
        self, sticky: Path, overwrite: values.OverwriteScope, make: Callable[[Path], object]
    ) -> None:
        """It came at the last moment, too."""
        made: list[os.stat_result] = []

        def swap() -> None:
            (sticky / "new").unlink()
            make(sticky / "new")
            made.append((sticky / "new").lstat())

        assert outcome_of(grant_to(sticky, overwrite=overwrite), swap, None) == "DEST_EXISTS"
        assert os.path.samestat(made[0], (sticky / "new").lstat())
        assert os.listdir(sticky) == ["new"]

    def test_exchange_keeps_a_disk_that_qemu_opened_at_the_last_moment(self, sticky: Path) -> None:
        """It would go on writing into the void."""
        with (sticky / "new").open("r+b") as disk:
            assert outcome_of(grant_to(sticky), lambda: lock(disk), None) == "IMAGE_IN_USE"
            assert os.path.samestat(os.fstat(disk.fileno()), (sticky / "new").stat())
        assert (sticky / "new").read_bytes() == OLD
        assert os.listdir(sticky) == ["new"]

    def test_name_removed_at_the_last_moment_is_published_as_a_new_file(self, sticky: Path) -> None:
        """Nothing is there to be exchanged, and what is there next is not replaced unseen."""
        remove = (sticky / "new").unlink
        create = functools.partial(put, sticky / "new", OLD)
        # The exchange finds nothing, nor does the next one; the renaming in between finds a file.
        assert outcome_of(grant_to(sticky), remove, create, remove, None) == "done"
        assert os.listdir(sticky) == ["new"]
        assert (sticky / "new").read_bytes() == NEW

    def test_file_created_after_the_name_was_removed_is_not_replaced(self, sticky: Path) -> None:
        """It is another user's."""
        create = functools.partial(put, sticky / "new", THEIRS, OTHER_USER.uid)
        assert outcome_of(grant_to(sticky), (sticky / "new").unlink, create) == "NOT_YOURS"
        assert os.listdir(sticky) == ["new"]
        assert (sticky / "new").read_bytes() == THEIRS

    @pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
    def test_name_created_and_removed_in_a_loop_loses_no_file(
        self, area: Path, mounts: Mounts, *, named: bool
    ) -> None:
        """Somebody makes and removes files there as fast as he can."""
        (area / "below").mkdir()
        place = mounts.by_fuse(area / "below", "fuse") if named else area / "below"
        other = os.fork()
        if other == 0:
            while True:
                put(place / "other", OLD).rename(place / "new")
                with contextlib.suppress(FileNotFoundError):
                    (place / "new").unlink()
        try:
            grant = grant_to(place)
            for _ in range(100):
                with written(grant) as dest:
                    name = functools.partial(publish.assign_name, grant, dest)
                    assert refusals.reason_of(name) in {"done", "NAME_REPLACED"}
        finally:
            os.kill(other, signal.SIGKILL)
            os.waitpid(other, 0)
        names = {name for name in os.listdir(area / "below") if not name.startswith(".fuse")}
        assert names <= {"new", "other"}

    def test_caller_access_in_a_sticky_directory_is_refused_before_the_exchange(
        self, sticky: Path
    ) -> None:
        """In a sticky directory another's file is not even touched."""
        put(sticky / "theirs", THEIRS, OTHER_USER.uid)
        grant = grant_to(
            sticky, access=values.RootAccess.CALLER, overwrite=values.OverwriteScope.ANY
        )
        swap = functools.partial((sticky / "theirs").rename, sticky / "new")
        assert outcome_of(grant, swap) == "ACCESS_REFUSED"
        assert (sticky / "new").read_bytes() == THEIRS
        assert os.listdir(sticky) == ["new"]


class TestUndoneExchange:
    """The moment after an exchange that has to be undone."""

    def outcome_of(self, directory: Path, act: moments.Act, *further: moments.Act | None) -> str:
        """What becomes of a result if what it was exchanged with is a disk in use by then.

        It is another user's; and `act` happens just before it gets its name back.
        """
        put(directory / "new", THEIRS, OTHER_USER.uid)
        with (directory / "new").open("r+b") as disk:
            return outcome_of(grant_to_any(directory), lambda: lock(disk), act, *further)

    def test_undone_exchange_keeps_a_third_file_at_the_name(
        self, area: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Who had the name first has it; the other one's data is whole, and the log says where."""
        third = put(area / "third", b"a third one", 1777)
        swap = functools.partial(third.rename, area / "new")
        with caplog.at_level(logging.WARNING):
            assert self.outcome_of(area, swap) == "IMAGE_IN_USE"
        assert (area / "new").read_bytes() == THEIRS
        (name,) = set(os.listdir(area)) - {"new"}
        assert (area / name).read_bytes() == b"a third one"
        assert name in caplog.text

    @pytest.mark.parametrize("access", [values.RootAccess.CALLER, values.RootAccess.DAEMON])
    def test_undone_exchange_replaces_no_file_of_another_user(
        self, sticky: Path, access: values.RootAccess
    ) -> None:
        """In a sticky directory the caller has its disk locked and removes the result in between.

        Another user makes a file of that name. The disk is kept, and no sweep removes it.
        """

        def swap() -> None:
            (sticky / "new").unlink()
            put(sticky / "new", THEIRS, OTHER_USER.uid)

        with (sticky / "new").open("r+b") as disk:
            outcome = outcome_of(grant_to(sticky, access=access), lambda: lock(disk), swap)
        assert outcome == "WRITE_FAILED"
        assert (sticky / "new").read_bytes() == THEIRS
        (kept,) = set(os.listdir(sticky)) - {"new"}
        with paths.open_target(grant_to(sticky, dest="other")) as target:
            temporaries.sweep(target.directory, CALLER.uid)
        assert (sticky / kept).read_bytes() == OLD

    def test_undone_exchange_gives_a_freed_name_back(self, area: Path) -> None:
        """The caller removed the result, which was its own to remove."""
        assert self.outcome_of(area, (area / "new").unlink, None) == "IMAGE_IN_USE"
        assert (area / "new").read_bytes() == THEIRS
        assert os.listdir(area) == ["new"]

    def test_undone_exchange_accepts_that_the_owner_removed_the_file(self, area: Path) -> None:
        """There is nothing to be given back."""

        def remove() -> None:
            (name,) = set(os.listdir(area)) - {"new"}
            (area / name).unlink()

        assert self.outcome_of(area, remove, None) == "IMAGE_IN_USE"
        assert (area / "new").read_bytes() == NEW

    def test_undone_exchange_that_fails_keeps_the_file_and_logs_its_name(
        self, area: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The directory has become append-only at this very moment."""
        try:
            make_append_only = functools.partial(chattr, "+a", area)
            assert self.outcome_of(area, make_append_only) == "WRITE_FAILED"
        finally:
            chattr("-a", area)
        (name,) = set(os.listdir(area)) - {"new"}
        assert (area / name).read_bytes() == THEIRS
        assert name in caplog.text

    def test_file_left_by_a_killed_exchange_is_never_removed(self, area: Path) -> None:
        """It is not the file that was judged, so it may be anybody's."""
        put(area / "new", THEIRS, OTHER_USER.uid)
        with written(grant_to_any(area)) as dest:
            name = temporaries.new_name_to_exchange(os.fstat(dest.fd).st_ino, 1)
            path = f"/proc/self/fd/{dest.fd}"
            os.link(path, name, dst_dir_fd=dest.target.directory, follow_symlinks=True)
            renameat2(dest.target.directory, name, "new", Flag.EXCHANGE)
            temporaries.sweep(dest.target.directory, OTHER_USER.uid)
            assert (area / name).read_bytes() == THEIRS


def grant_to_any(directory: Path) -> values.ConvertGrant:
    """Leave to write over anybody's file."""
    return grant_to(directory, overwrite=values.OverwriteScope.ANY)


class TestWithoutRenameExchange:
    """A file system that does not know RENAME_EXCHANGE; here FUSE."""

    @pytest.fixture
    def fuse(self, area: Path, mounts: Mounts) -> Path:
        """A directory of root's on FUSE, with an old file of the caller's."""
        (area / "below").mkdir()
        put(area / "below" / "new", OLD)
        return mounts.by_fuse(area / "below", "fuse")

    def test_overwrite_without_exchange_works_where_no_other_user_can_write(
        self, fuse: Path
    ) -> None:
        """Root's directory, or the caller's own."""
        for owner in (0, CALLER.uid):
            os.chown(fuse, owner, owner)
            grant = grant_to(fuse)
            with written(grant) as dest:
                assert publish.assign_name(grant, dest) is True
            assert (fuse / "new").read_bytes() == NEW

    @pytest.mark.parametrize(
        ("owner", "mode"),
        [(0, 0o1777), (0, 0o775), (OTHER_USER.uid, 0o755)],
        ids=["everybody's", "a-group's", "another-user's"],
    )
    def test_overwrite_without_exchange_is_refused_where_others_can_write(
        self, fuse: Path, owner: int, mode: int
    ) -> None:
        """The check and the rename would be two steps."""
        os.chown(fuse, owner, owner)
        fuse.chmod(mode)
        before = (fuse / "new").stat().st_ino
        failure = refusals.refusal_of(lambda: written(grant_to(fuse)).__enter__())
        assert failure is not None
        assert failure.reason == "UNSUPPORTED"
        assert "exchange" in failure.message
        assert (fuse / "new").stat().st_ino == before
        assert os.listdir(fuse) == ["new"]

    def test_file_system_with_rename_exchange_is_detected(self, sticky: Path) -> None:
        """It is tried with two empty files, and each has its own name afterwards."""
        named = put(sticky / ".convertd-0123456789abcdef.tmp", NEW)
        before = named.stat()
        with paths.open_target(grant_to(sticky)) as target:
            replace.check_possible(grant_to(sticky), target, named.name)
        assert os.path.samestat(before, named.stat())
        assert sorted(os.listdir(sticky)) == [named.name, "new"]

    def test_overwrite_without_exchange_is_refused_if_the_directory_was_opened(
        self, fuse: Path
    ) -> None:
        """The directory was closed when the conversion began."""
        grant = grant_to(fuse)
        with written(grant) as dest:
            fuse.chmod(0o1777)
            assert refusals.reason_of(lambda: publish.assign_name(grant, dest)) == "UNSUPPORTED"
        assert (fuse / "new").read_bytes() == OLD
        assert os.listdir(fuse) == ["new"]

    def test_overwrite_without_exchange_replaces_any_file_if_the_policy_allows_it(
        self, fuse: Path
    ) -> None:
        """By rename(2): whose it is does not matter."""
        fuse.chmod(0o1777)
        grant = grant_to_any(fuse)
        with written(grant) as dest:
            put(fuse / "theirs", THEIRS, OTHER_USER.uid).rename(fuse / "new")
            assert publish.assign_name(grant, dest) is True
        assert (fuse / "new").read_bytes() == NEW
        assert os.listdir(fuse) == ["new"]
