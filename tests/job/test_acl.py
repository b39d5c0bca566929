"""A directory's default access control list, inherited as by a file that open(2) makes there."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grants
import pytest
import whole_job
from harness.mounts import Mounts

from convertd_core import values
from convertd_daemon.job import local_grant
from convertd_daemon.job.files import (
    acl,
    file_dest,
    ownership,
    paths,
)
from convertd_daemon.linux import posix_acl

SETUP = whole_job.setup()

LISTS = [
    pytest.param("u:1666:rw,g:1700:r", id="a-user-and-a-group"),
    pytest.param("u:1666:rwx,g::---,o::---", id="closed-to-the-owning-group"),
    pytest.param("u:1666:rw,m::r", id="a-mask"),
    pytest.param("u::r,g::r,o::-", id="a-list-that-is-only-a-mode"),
    pytest.param("u::rw,g::rw,o::rw", id="one-that-allows-everything"),
    pytest.param("u:1666:---,g:1234:rw,u:1234:---", id="one-that-takes-away"),
]
MODES = [0o000, 0o600, 0o640, 0o664, 0o666]


@pytest.fixture(params=["ext4", "xfs", "btrfs", "tmpfs"])
def directory(request: pytest.FixtureRequest, mounts: Mounts) -> Path:
    """A directory on a file system that has such lists."""
    if request.param == "tmpfs":
        point = mounts.in_memory("tmpfs", "disk")
    else:
        point = mounts.on_a_loop(request.param, "disk", 64)
    (point / "below").mkdir()
    return point / "below"


def set_default(directory: Path, entries: str) -> None:
    """Give a directory a default list."""
    subprocess.run(["setfacl", "-b", str(directory)], check=True)
    subprocess.run(["setfacl", "-d", "-m", entries, str(directory)], check=True)


def list_of(path: Path) -> list[str]:
    """The list of a file, as getfacl(1) tells it; without it, its mode in the same form."""
    argv = ["getfacl", "--omit-header", "--absolute-names", "--numeric", str(path)]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()


def opened(directory: Path, mode: int) -> list[str]:
    """The list that open(2) gives a new file there."""
    path = directory / "by-open"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    try:
        return list_of(path)
    finally:
        path.unlink()


@contextlib.contextmanager
def created(directory: Path, mode: int, **changes: object) -> Iterator[file_dest.FileDest]:
    """A result that is being written."""
    rules = grants.Rules(roots=(grants.files(directory, **changes),))
    asked = grants.to(grants.request(directory / "x", directory / "new"), mode=mode)
    with (
        paths.open_target(rules.convert(asked)) as target,
        file_dest.create(rules.convert(asked), target, SETUP) as dest,
    ):
        yield dest


def linked(dest: file_dest.FileDest, path: Path) -> Path:
    """Settle whose a result is, and give it a name."""
    assert ownership.settle(dest.fd, dest.ownership, dest.target) == ()
    os.link(f"/proc/self/fd/{dest.fd}", path.name, dst_dir_fd=dest.target.directory)
    return path


@pytest.mark.parametrize("entries", LISTS)
def test_result_has_the_acl_that_open_would_have_given_it(directory: Path, entries: str) -> None:
    """For each mode that can be asked for, on each file system."""
    set_default(directory, entries)
    for mode in MODES:
        with created(directory, mode) as dest:
            path = linked(dest, directory / "new")
        assert list_of(path) == opened(directory, mode), oct(mode)
        path.unlink()


def test_acl_entry_allows_no_more_than_the_requested_mode(area: Path) -> None:
    """A root's mode of 0600 keeps what is created closed to whomever the list names."""
    set_default(area, "u:1666:rw")
    with created(area, 0o600) as dest:
        path = linked(dest, area / "new")
    assert list_of(path)[1:3] == ["user:1666:rw-", "#effective:---"]
    assert can_read(path, 1666) is False
    path.unlink()
    with created(area, 0o640) as dest:
        path = linked(dest, area / "new")
    assert can_read(path, 1666) is True


def test_unfinished_result_can_not_be_opened_by_users_in_the_default_acl(area: Path) -> None:
    """Only the worker, by its group."""
    set_default(area, "u:1666:rw,g:1700:rw,o::rw")
    with created(area, 0o666) as dest:
        assert posix_acl.ACCESS not in os.listxattr(dest.fd)
        path = area / "half-written"
        os.link(f"/proc/self/fd/{dest.fd}", path.name, dst_dir_fd=dest.target.directory)
        assert can_read(path, 1666) is False
        assert can_read(path, whole_job.WORKER.uid, whole_job.WORKER.gid) is True


def can_read(path: Path, uid: int, gid: int = 9999) -> bool:
    """Whether a user could open a file."""
    argv = ["cat", str(path)]
    ran = subprocess.run(
        argv, check=False, capture_output=True, user=uid, group=gid, extra_groups=[]
    )
    return ran.returncode == 0


def test_local_conversion_inherits_the_default_acl(area: Path) -> None:
    """The job has its caller's own rights then."""
    set_default(area, "u:1666:rw")
    rules = grants.Rules(roots=(local_grant.EVERYTHING,))
    peer = values.Peer(uid=0, gid=0, groups=frozenset(), pid=1)
    asked = grants.to(grants.request(area / "x", area / "new"), mode=0o640)
    grant = values.ConvertGrant(
        rule="",
        peer=peer,
        request=asked,
        source=values.Place(root=local_grant.EVERYTHING, below="x"),
        dest=values.Place(root=local_grant.EVERYTHING, below=f"{area}/new"[1:]),
        readable=rules.roots,
        read_formats=values.FORMATS,
        overwrite=values.OverwriteScope.ANY,
        limits=values.DEFAULT_LIMITS,
    )
    alone = dataclasses.replace(SETUP, identity=None)
    with paths.open_target(grant) as target, file_dest.create(grant, target, alone) as dest:
        path = linked(dest, area / "new")
    assert list_of(path) == opened(area, 0o640)


@pytest.mark.parametrize(
    "data",
    [b"", b"\2\0\0", b"\1\0\0\0", b"\2\0\0\0\1\0\6\0\xff\xff\xff"],
    ids=["empty", "short", "another-version", "odd"],
)
def test_invalid_acl_is_an_error(data: bytes) -> None:
    """The kernel hands out none such, or hands on what a file system's server says."""
    with pytest.raises(OSError, match="access control list"):
        acl.inherited(data, 0o600)
