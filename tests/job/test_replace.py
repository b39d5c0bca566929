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
from typing import Any

import grants
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
STRANGER = grants.STRANGER
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


@pytest.fixture
def sticky(area: Path) -> Path:
    """A directory as /tmp, with an old file of the caller's."""
    area.chmod(0o1777)
    put(area / "new", OLD)
    return area


@contextlib.contextmanager
def judged(grant: values.ConvertGrant) -> Iterator[Callable[[], str]]:
    """A result just after what has the name was judged to be replaceable.

    Gives what is done next, and says what becomes of it.
    """
    with written(grant) as dest, replace._held(grant, dest) as held:  # noqa: SLF001 - the moment
        # between the judgement and the exchange
        yield lambda: refusals.reason_of(
            lambda: replace._put_over(grant, dest, held)  # noqa: SLF001 - as above
        )


class TestExchange:
    """What came out is judged, and not what was there before."""

    def test_exchange_keeps_a_file_another_user_put_there_at_the_last_moment(
        self, sticky: Path
    ) -> None:
        """Its inode, its data, its owner."""
        theirs = put(sticky / "theirs", THEIRS, STRANGER.uid).stat()
        grant = grant_to(sticky)
        with judged(grant) as put_over:
            (sticky / "theirs").rename(sticky / "new")
            assert put_over() == "NOT_YOURS"
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
        grant = grant_to(sticky, overwrite=overwrite)
        with judged(grant) as put_over:
            (sticky / "new").unlink()
            make(sticky / "new")
            before = (sticky / "new").lstat()
            assert put_over() == "DEST_EXISTS"
        assert os.path.samestat(before, (sticky / "new").lstat())
        assert os.listdir(sticky) == ["new"]

    def test_exchange_keeps_a_disk_that_qemu_opened_at_the_last_moment(self, sticky: Path) -> None:
        """It would go on writing into the void."""
        grant = grant_to(sticky)
        with judged(grant) as put_over, (sticky / "new").open("r+b") as disk:
            fcntl.fcntl(disk, fcntl.F_OFD_SETLK, WRITE_LOCK)
            assert put_over() == "IMAGE_IN_USE"
            assert os.path.samestat(os.fstat(disk.fileno()), (sticky / "new").stat())
        assert (sticky / "new").read_bytes() == OLD
        assert os.listdir(sticky) == ["new"]

    def test_name_removed_at_the_last_moment_is_published_as_a_new_file(self, sticky: Path) -> None:
        """Nothing is there to be exchanged, and what is there next is not replaced unseen."""
        grant = grant_to(sticky)
        with judged(grant) as put_over:
            (sticky / "new").unlink()
            with pytest.raises(FileNotFoundError):
                put_over()
            (name,) = os.listdir(sticky)
            with paths.open_target(grant) as target:
                put(sticky / "new", THEIRS, STRANGER.uid)
                with pytest.raises(FileExistsError):
                    replace._move(target, name)  # noqa: SLF001 - as above
                (sticky / "new").unlink()
                replace._move(target, name)  # noqa: SLF001 - as above
        assert os.listdir(sticky) == ["new"]
        assert (sticky / "new").read_bytes() == NEW

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
        put(sticky / "theirs", THEIRS, STRANGER.uid)
        grant = grant_to(
            sticky, access=values.RootAccess.CALLER, overwrite=values.OverwriteScope.ANY
        )
        with judged(grant) as put_over:
            (sticky / "theirs").rename(sticky / "new")
            with pytest.raises(PermissionError):
                put_over()
        assert (sticky / "new").read_bytes() == THEIRS
        assert os.listdir(sticky) == ["new"]


class TestUndoneExchange:
    """The moment after an exchange that has to be undone."""

    @contextlib.contextmanager
    def held(self, directory: Path) -> Iterator[tuple[file_dest.FileDest, str]]:
        """A result that has the name, and another user's file that had it."""
        put(directory / "new", THEIRS, STRANGER.uid)
        with written(grant_to_any(directory)) as dest:
            name = temporaries.new_name_to_exchange(os.fstat(dest.fd).st_ino, 1)
            path = f"/proc/self/fd/{dest.fd}"
            os.link(path, name, dst_dir_fd=dest.target.directory, follow_symlinks=True)
            renameat2(dest.target.directory, name, "new", Flag.EXCHANGE)
            yield dest, name

    def test_undone_exchange_keeps_a_third_file_at_the_name(
        self, area: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Who had the name first has it; the other one's data is whole, and the log says where."""
        with self.held(area) as (dest, name), caplog.at_level(logging.WARNING):
            put(area / "third", b"a third one", 1777).rename(area / "new")
            replace._give_back(grant_to_any(area), dest, name)  # noqa: SLF001 - as above
        assert (area / "new").read_bytes() == THEIRS
        assert (area / name).read_bytes() == b"a third one"
        assert sorted(os.listdir(area)) == sorted(["new", name])
        assert name in caplog.text

    @pytest.mark.parametrize("access", [values.RootAccess.CALLER, values.RootAccess.DAEMON])
    def test_undone_exchange_replaces_no_file_of_another_user(
        self, sticky: Path, access: values.RootAccess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In a sticky directory the caller has its disk locked and removes the result in between.

        Another user makes a file of that name. The disk is kept, and no sweep removes it.
        """
        grant = grant_to(sticky, access=access)
        judge = replace._judge  # noqa: SLF001 - the moment after the exchange

        def judge_late(*arguments: Any) -> int:  # noqa: ANN401 - as they come
            (sticky / "new").unlink()
            put(sticky / "new", THEIRS, STRANGER.uid)
            return judge(*arguments)

        with judged(grant) as put_over, (sticky / "new").open("r+b") as disk:
            fcntl.fcntl(disk, fcntl.F_OFD_SETLK, WRITE_LOCK)
            monkeypatch.setattr(replace, "_judge", judge_late)
            assert put_over() == "WRITE_FAILED"
        assert (sticky / "new").read_bytes() == THEIRS
        (kept,) = set(os.listdir(sticky)) - {"new"}
        with paths.open_target(grant_to(sticky, dest="other")) as target:
            temporaries.sweep(target.directory, CALLER.uid)
        assert (sticky / kept).read_bytes() == OLD

    def test_undone_exchange_gives_a_freed_name_back(self, area: Path) -> None:
        """The caller removed the result, which was its own to remove."""
        with self.held(area) as (dest, name):
            (area / "new").unlink()
            replace._give_back(grant_to_any(area), dest, name)  # noqa: SLF001 - as above
        assert (area / "new").read_bytes() == THEIRS
        assert os.listdir(area) == ["new"]

    def test_undone_exchange_accepts_that_the_owner_removed_the_file(self, area: Path) -> None:
        """There is nothing to be given back."""
        with self.held(area) as (dest, name):
            (area / name).unlink()
            replace._give_back(grant_to_any(area), dest, name)  # noqa: SLF001 - as above
            assert (area / "new").read_bytes() == NEW

    def test_undone_exchange_that_fails_keeps_the_file_and_logs_its_name(self, area: Path) -> None:
        """The directory has become append-only at this very moment."""
        with self.held(area) as (dest, name):
            subprocess.run(["chattr", "+a", str(area)], check=True)
            failure = refusals.refusal_of(
                lambda: replace._give_back(grant_to_any(area), dest, name)  # noqa: SLF001 - as above
            )
            subprocess.run(["chattr", "-a", str(area)], check=True)
            assert (area / name).read_bytes() == THEIRS
        assert failure is not None
        assert failure.reason == "WRITE_FAILED"
        assert name in failure.message

    def test_file_left_by_a_killed_exchange_is_never_removed(self, area: Path) -> None:
        """It is not the file that was judged, so it may be anybody's."""
        with self.held(area) as (dest, name):
            temporaries.sweep(dest.target.directory, STRANGER.uid)
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
        [(0, 0o1777), (0, 0o775), (STRANGER.uid, 0o755)],
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
            put(fuse / "theirs", THEIRS, STRANGER.uid).rename(fuse / "new")
            assert publish.assign_name(grant, dest) is True
        assert (fuse / "new").read_bytes() == NEW
        assert os.listdir(fuse) == ["new"]
