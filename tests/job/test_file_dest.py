"""The file that is being written: no name, an owner from the first byte, and gone if it fails."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import grp
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import failing
import grants
import pytest
import refusals
import whole_job
from descriptors import none_left_open
from harness.mounts import Mounts

from convertd_core import conditions, values
from convertd_daemon.job import local_grant
from convertd_daemon.job.files import (
    credentials,
    file_dest,
    ownership,
    paths,
    temporaries,
)
from convertd_daemon.sandbox.setup import Setup

CALLER = grants.CALLER
WORKER = whole_job.WORKER
SETUP = whole_job.setup()
WITHOUT_WORKER = dataclasses.replace(SETUP, identity=None)
"""As without a daemon."""


def grant_to(
    directory: Path, *, root: values.Root | None = None, **asked: object
) -> values.ConvertGrant:
    """Leave to write the file `new` there."""
    rules = grants.Rules(roots=(root or grants.files(directory),))
    request = grants.request(directory / "never-read", directory / "new")
    return rules.convert(grants.to(request, **asked))


@contextlib.contextmanager
def created(grant: values.ConvertGrant, setup: Setup = SETUP) -> Iterator[file_dest.FileDest]:
    """Make the file for a grant."""
    with paths.open_target(grant) as target, file_dest.create(grant, target, setup) as dest:
        yield dest


def refusal_of(grant: values.ConvertGrant) -> conditions.Failure:
    """What the making is refused with; nothing is left open, nor in the directory."""
    directory = os.path.dirname(grant.dest.path)
    before = os.listdir(directory)
    with none_left_open():
        failure = refusals.refusal_of(lambda: created(grant).__enter__())
    assert os.listdir(directory) == before
    assert failure is not None
    return failure


def owner_and_mode(descriptor: int) -> tuple[int, int, int]:
    """Uid, gid and permission bits."""
    status = os.fstat(descriptor)
    return status.st_uid, status.st_gid, status.st_mode & 0o7777


class TestUnnamedTemporary:
    """Where the file system has O_TMPFILE."""

    def test_unnamed_temporary_is_in_no_directory(self, area: Path) -> None:
        """And is gone when the block is left."""
        with created(grant_to(area)) as dest:
            os.write(dest.fd, b"x")
            assert os.listdir(area) == []
            assert os.fstat(dest.fd).st_nlink == 0
            assert dest.temporary == ""
        assert os.listdir(area) == []
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(dest.fd)

    def test_unnamed_temporary_belongs_to_its_owner_and_is_writable_by_the_worker(
        self, area: Path
    ) -> None:
        """It counts to the owner's quota; the worker owns nothing, and so can't chmod it."""
        with created(grant_to(area)) as dest:
            assert owner_and_mode(dest.fd) == (CALLER.uid, WORKER.gid, 0o060)

    def test_unnamed_temporary_without_a_worker_is_private_to_the_caller(self, area: Path) -> None:
        """Without a daemon qemu-img has the caller's own uid."""
        with created(grant_to(area), WITHOUT_WORKER) as dest:
            assert owner_and_mode(dest.fd) == (0, 0, 0o600)

    def test_unnamed_temporary_ignores_the_default_acl_of_the_directory(self, area: Path) -> None:
        """It would mask the worker's bits, and let others read what is being written."""
        setfacl = ["setfacl", "-d", "-m", "u:1666:rwx,g::r,m::r,o::r", str(area)]
        subprocess.run(setfacl, check=True)
        with created(grant_to(area)) as dest:
            assert owner_and_mode(dest.fd) == (CALLER.uid, WORKER.gid, 0o060)
            assert "system.posix_acl_access" not in os.listxattr(dest.fd)

    def test_temporary_is_locked_while_it_exists(self, area: Path) -> None:
        """Whoever sweeps the directory for left-overs asks for this lock first."""
        with created(grant_to(area)) as dest:
            again = os.open(f"/proc/self/fd/{dest.fd}", os.O_RDONLY)
            with pytest.raises(BlockingIOError):
                fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(again)

    def test_vmdk_temporary_has_a_path_with_the_final_name(self, area: Path) -> None:
        """A link for the worker, which is gone afterwards."""
        (area / "names").mkdir()
        setup = dataclasses.replace(SETUP, names=str(area / "names"))
        with created(grant_to(area, format="vmdk"), setup) as dest:
            assert os.path.basename(dest.alias) == "new"
            assert os.readlink(dest.alias) == f"/proc/self/fd/{dest.fd}"
            assert os.path.dirname(os.path.dirname(dest.alias)) == str(area / "names")
        assert os.listdir(area / "names") == []
        with created(grant_to(area), setup) as dest:
            assert dest.alias == ""

    def test_special_characters_in_a_vmdk_name_are_replaced(self, area: Path) -> None:
        """A quote would end the name, a newline the line."""
        (area / "names").mkdir()
        setup = dataclasses.replace(SETUP, names=str(area / "names"))
        rules = grants.Rules(roots=(grants.files(area),))
        asked = grants.request(area / "a", area / 'q"\nRW 1 FLAT "x', dest_format="vmdk")
        with created(rules.convert(asked), setup) as dest:
            assert os.path.basename(dest.alias) == "q__RW_1_FLAT__x"


@pytest.fixture
def fuse(area: Path, mounts: Mounts) -> Path:
    """A directory on a file system without O_TMPFILE."""
    (area / "below").mkdir(mode=0o777)
    (area / "below").chmod(0o777)
    return mounts.by_fuse(area / "below", "fuse")


def bind_socket(path: Path) -> None:
    """Put a socket there."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


LEFT = ".convertd-0123456789abcdef.tmp"


class TestNamedTemporary:
    """Where it has none: NFS, FUSE."""

    def test_named_temporary_has_a_random_name_and_the_same_rights(self, fuse: Path) -> None:
        """And is gone when the block is left."""
        with created(grant_to(fuse)) as dest:
            assert os.listdir(fuse) == [dest.temporary]
            assert dest.temporary.startswith(".convertd-")
            assert len(dest.temporary) > 24
            assert owner_and_mode(dest.fd) == (CALLER.uid, WORKER.gid, 0o060)
        assert os.listdir(fuse) == []

    def test_missing_named_temporary_after_publishing_is_no_error(self, fuse: Path) -> None:
        """Publishing takes the temporary name away."""
        with created(grant_to(fuse)) as dest:
            (fuse / dest.temporary).rename(fuse / "new")
        assert os.listdir(fuse) == ["new"]

    def test_temporary_in_a_closed_directory_is_left_and_logged(
        self, fuse: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """With the caller's rights it can't be taken away; the next sweep does."""
        os.chown(fuse, CALLER.uid, CALLER.gid)
        grant = grant_to(fuse, root=grants.files(fuse, access=values.RootAccess.CALLER))
        with created(grant) as dest:
            fuse.chmod(0o500)
            left = dest.temporary
        assert left in caplog.text
        fuse.chmod(0o700)
        with created(grant):
            assert left not in os.listdir(fuse)

    def test_temporary_hidden_by_a_mount_is_left_and_logged(
        self, fuse: Path, area: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Nothing is asked of what is mounted there: its server might never answer."""
        (area / "over").touch()
        with contextlib.ExitStack() as after, created(grant_to(fuse)) as dest:
            point = str(fuse / dest.temporary)
            subprocess.run(["mount", "--bind", str(area / "over"), point], check=True)
            after.callback(subprocess.run, ["umount", point], check=True)
        assert dest.temporary in caplog.text

    @pytest.mark.parametrize("access", [values.RootAccess.DAEMON, values.RootAccess.CALLER])
    def test_named_temporaries_of_killed_jobs_are_removed(
        self, fuse: Path, access: values.RootAccess
    ) -> None:
        """By whoever makes the next one there; while it was written its owner could not open it."""
        (fuse / LEFT).touch()
        os.chown(fuse / LEFT, CALLER.uid, CALLER.gid)
        (fuse / LEFT).chmod(ownership.FOR_THE_WORKER)
        with created(grant_to(fuse, root=grants.files(fuse, access=access))) as dest:
            assert os.listdir(fuse) == [dest.temporary]

    def test_temporary_examined_by_another_sweep_is_removed(self, fuse: Path) -> None:
        """Its lock is one for readers: NFS gives no other on what is open for reading alone."""
        (fuse / LEFT).touch()
        os.chown(fuse / LEFT, CALLER.uid, CALLER.gid)
        with (fuse / LEFT).open("rb") as looked_at:
            fcntl.flock(looked_at, fcntl.LOCK_SH)
            with created(grant_to(fuse)):
                # What is open keeps a name of the file system's own.
                assert LEFT not in os.listdir(fuse)

    def test_named_temporaries_of_running_jobs_are_kept(self, fuse: Path) -> None:
        """Two at once in one directory."""
        with created(grant_to(fuse)) as one, created(grant_to(fuse)) as two:
            assert {one.temporary, two.temporary} == set(os.listdir(fuse))

    @pytest.mark.parametrize(
        ("name", "make"),
        [
            pytest.param(".convertd-tmp", Path.touch, id="another-ending"),
            pytest.param("convertd-1.tmp", Path.touch, id="another-beginning"),
            pytest.param(".convertd-notes.tmp", Path.touch, id="no-digits"),
            pytest.param(f"{LEFT[:-5]}.tmp", Path.touch, id="too-few-digits"),
            pytest.param(f"{LEFT[:-4]}0.tmp", Path.touch, id="too-many-digits"),
            pytest.param(LEFT.upper().replace("TMP", "tmp"), Path.touch, id="capitals"),
            pytest.param(f"{LEFT}\n", Path.touch, id="a-newline"),
            pytest.param(f"{LEFT[:-4]}-1-2.tmp", Path.touch, id="other-inode-numbers"),
            pytest.param(LEFT, Path.mkdir, id="a-directory"),
            pytest.param(LEFT, os.mkfifo, id="a-fifo"),
            pytest.param(LEFT, lambda path: path.symlink_to("/etc/passwd"), id="a-link"),
            pytest.param(LEFT, bind_socket, id="a-socket"),
        ],
    )
    def test_objects_with_temporary_like_names_are_kept_unopened(
        self, area: Path, name: str, make: Callable[[Path], object]
    ) -> None:
        """Nothing is opened of it, so that nothing blocks."""
        make(area / name)
        os.chown(area / name, CALLER.uid, CALLER.gid, follow_symlinks=False)
        with paths.open_target(grant_to(area)) as target:
            temporaries.sweep(target.directory, CALLER.uid)
        assert os.listdir(area) == [name]

    def test_stale_temporaries_are_removed_with_the_rights_of_the_caller(self, area: Path) -> None:
        """In a sticky directory others' files stay, whatever they are called."""
        area.chmod(0o1777)
        (area / LEFT).touch(0o600)
        root = grants.files(area, access=values.RootAccess.CALLER)
        grant = grant_to(area, root=root)
        with paths.open_target(grant) as target, credentials.acting_for(root, CALLER):
            temporaries.sweep(target.directory, 0)
        assert os.listdir(area) == [LEFT]

    @pytest.mark.parametrize("uid", [0, grants.OTHER_USER.uid], ids=["root's", "another-user's"])
    @pytest.mark.parametrize("access", [values.RootAccess.DAEMON, values.RootAccess.CALLER])
    def test_temporaries_of_other_users_are_kept(
        self, area: Path, uid: int, access: values.RootAccess
    ) -> None:
        """Whatever they are called: they may be anything."""
        area.chmod(0o777)
        (area / LEFT).write_bytes(b"precious")
        os.chown(area / LEFT, uid, uid)
        grant = grant_to(area, root=grants.files(area, access=access))
        with paths.open_target(grant) as target, credentials.acting_for(grant.dest.root, CALLER):
            temporaries.sweep(target.directory, CALLER.uid)
        assert (area / LEFT).read_bytes() == b"precious"

    def test_temporaries_open_in_qemu_are_kept(self, area: Path) -> None:
        """It would go on writing into the void."""
        (area / LEFT).touch()
        with (area / LEFT).open("r+b") as file:
            lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 101, 1, 0)
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
            with paths.open_target(grant_to(area)) as target:
                temporaries.sweep(target.directory, 0)
                assert os.listdir(area) == [LEFT]
                fcntl.fcntl(
                    file,
                    fcntl.F_OFD_SETLK,
                    struct.pack("hhqqi4x", fcntl.F_UNLCK, os.SEEK_SET, 101, 1, 0),
                )
                temporaries.sweep(target.directory, 0)
        assert os.listdir(area) == []

    def test_second_hard_link_of_a_published_result_is_removed(self, area: Path) -> None:
        """A kill between link(2) and unlink(2) leaves two."""
        (area / "result").write_bytes(b"whole")
        os.link(area / "result", area / LEFT)
        with paths.open_target(grant_to(area)) as target:
            temporaries.sweep(target.directory, 0)
        assert os.listdir(area) == ["result"]
        assert (area / "result").read_bytes() == b"whole"

    def test_exchanged_file_is_removed_if_it_matches_its_temporary_name(self, area: Path) -> None:
        """The result, or the very file that was judged replaceable."""
        for number in range(3):
            (area / f"{number}").touch()
        inodes = [(area / f"{number}").stat().st_ino for number in range(3)]
        names = [temporaries.new_name_to_exchange(*inodes[:2]) for _ in range(3)]
        for number, name in enumerate(names):
            (area / f"{number}").rename(area / name)
        with paths.open_target(grant_to(area)) as target:
            temporaries.sweep(target.directory, 0)
        assert os.listdir(area) == [names[2]]

    def test_stale_temporaries_are_removed_in_limited_batches(self, area: Path) -> None:
        """Whoever fills a directory with them has them looked at to a bound."""
        for number in range(temporaries.MOST_EXAMINED + 100):
            (area / f".convertd-{number:016x}.tmp").touch()
        with paths.open_target(grant_to(area)) as target:
            temporaries.sweep(target.directory, 0)
            assert len(os.listdir(area)) == 100
            temporaries.sweep(target.directory, 0)
        assert os.listdir(area) == []

    def test_temporary_removed_before_it_was_locked_is_created_anew(self, area: Path) -> None:
        """Another process sweeps all the time, with the right to remove everything."""
        (area / "below").mkdir()
        with Mounts(area) as mounts:
            fuse = mounts.by_fuse(area / "below", "fuse", "--force-user=root")
            sweeper = os.fork()
            if sweeper == 0:
                directory = os.open(fuse, os.O_RDONLY | os.O_DIRECTORY)
                while True:
                    temporaries.sweep(directory, 0)
            try:
                root = grants.files(fuse, allow_ownerless=True)
                for _ in range(30):
                    with created(grant_to(fuse, root=root), WITHOUT_WORKER) as dest:
                        assert dest.temporary in os.listdir(fuse)
            finally:
                os.kill(sweeper, signal.SIGKILL)
                os.waitpid(sweeper, 0)


class TestResultOwnership:
    """Whose the result is in the end."""

    def owned(
        self, area: Path, root: values.Root | None = None, **asked: object
    ) -> tuple[int, ...]:
        """Uid, gid and mode that a result will have."""
        with created(grant_to(area, root=root, **asked)) as dest:
            return dataclasses.astuple(dest.ownership)[:3]

    def test_result_gets_the_caller_as_owner_and_the_mode_of_the_root(self, area: Path) -> None:
        """By default."""
        assert self.owned(area) == (CALLER.uid, CALLER.gid, 0o600)
        assert self.owned(area, grants.files(area, mode=0o640))[2] == 0o640

    def test_result_gets_the_mode_in_the_request(self, area: Path) -> None:
        """Also none at all."""
        assert self.owned(area, mode=0o644)[2] == 0o644
        assert self.owned(area, mode=0)[2] == 0

    def test_result_gets_the_owner_configured_for_the_root(self, area: Path) -> None:
        """If the policy names one."""
        root = grants.files(area, owner=values.Owner(uid=7, gid=8))
        assert self.owned(area, root) == (7, 8, 0o600)

    def test_result_gets_the_group_of_a_setgid_directory(self, area: Path) -> None:
        """As open(2) would; it outranks the root's."""
        os.chown(area, 0, 1500)
        area.chmod(0o2755)
        assert self.owned(area) == (CALLER.uid, 1500, 0o600)
        root = grants.files(area, owner=values.Owner(uid=7, gid=8))
        assert self.owned(area, root) == (7, 1500, 0o600)

    @pytest.mark.parametrize("group", ["1234", "1300", "1400"])
    def test_result_gets_the_group_in_the_request(self, area: Path, group: str) -> None:
        """It outranks the directory's: it was asked for."""
        os.chown(area, 0, 1500)
        area.chmod(0o2755)
        assert self.owned(area, group=group)[1] == int(group)

    def test_result_gets_a_group_requested_by_name(self, area: Path) -> None:
        """If the caller is in it."""
        entry = grp.getgrnam("daemon")
        peer = dataclasses.replace(CALLER, groups=frozenset({entry.gr_gid}))
        rules = grants.Rules(roots=(grants.files(area),), peer=peer)
        asked = grants.to(grants.request(area / "a", area / "new"), group="daemon")
        with created(rules.convert(asked)) as dest:
            assert dest.ownership.gid == entry.gr_gid

    @pytest.mark.parametrize("group", ["0", "root", "1500", "no-such-group", "4294967295"])
    def test_result_group_the_caller_is_not_in_is_refused(self, area: Path, group: str) -> None:
        """It could not chgrp to it itself; whether there is one is not told."""
        failure = refusal_of(grant_to(area, group=group))
        assert failure.message == f"dest.group: {group!r} is not a group of yours"

    def test_local_result_gets_the_own_uid(self, area: Path) -> None:
        """And the group is left as the directory gives it."""
        grant = dataclasses.replace(
            grant_to(area), dest=values.Place(root=local_grant.EVERYTHING, below=f"{area}/new"[1:])
        )
        with created(grant, WITHOUT_WORKER) as dest:
            assert dest.ownership.gid == -1


class TestRefusals:
    """Where nothing can be made."""

    def test_directory_the_caller_may_not_write_is_refused(self, area: Path) -> None:
        """With its own rights; the daemon's would do."""
        root = grants.files(area, access=values.RootAccess.CALLER)
        failure = refusal_of(grant_to(area, root=root))
        assert failure.reason == "ACCESS_REFUSED"
        assert "uid 1234" in failure.message
        with created(grant_to(area)):
            pass

    def test_caller_access_creates_a_result_in_a_directory_of_the_caller(self, area: Path) -> None:
        """Also by one of its groups; the result is the caller's as everywhere."""
        os.chown(area, 0, 1400)
        area.chmod(0o775)
        with created(
            grant_to(area, root=grants.files(area, access=values.RootAccess.CALLER))
        ) as dest:
            assert owner_and_mode(dest.fd) == (CALLER.uid, WORKER.gid, 0o060)

    def test_read_only_file_system_is_refused_for_a_result(
        self, area: Path, mounts: Mounts
    ) -> None:
        """It has a condition of its own."""
        (area / "below").mkdir()
        point = mounts.bound(area / "below", "point", read_only=True)
        assert refusal_of(grant_to(point)).reason == "READ_ONLY_FILE_SYSTEM"

    def test_file_system_without_free_inodes_is_refused_for_a_result(self, mounts: Mounts) -> None:
        """It may have space left, but no inode."""
        point = mounts.in_memory("tmpfs", "full", "mode=755,nr_inodes=2")
        (point / "the-last-one").touch()
        failure = refusal_of(grant_to(point))
        assert failure.reason == "NO_SPACE"
        assert dict(failure.values)["mount_point"] == str(point)

    @pytest.mark.parametrize(
        ("number", "expected"),
        [
            (errno.EDQUOT, "QUOTA_EXCEEDED"),
            (errno.EPERM, "ACCESS_REFUSED"),
            (errno.EIO, "WRITE_FAILED"),
        ],
        ids=["quota", "not-permitted", "broken"],
    )
    def test_errno_without_a_test_file_system_has_its_condition(
        self, area: Path, number: int, expected: str
    ) -> None:
        """A quota, for one."""
        with failing.o_tmpfile(errno.errorcode[number]):
            assert refusal_of(grant_to(area)).reason == expected
