"""Snapshots of a chain: whose they are, and when there is none."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import failing
import grants
import pytest
import refusals
import whole_job
from children import in_child
from harness.mounts import Mounts

from convertd_core import values
from convertd_daemon import channel
from convertd_daemon.job import context, endpoints
from convertd_daemon.job.files import paths
from convertd_daemon.job.qemu import backing_chain, execution
from convertd_daemon.job.reflink import sharing

MIB = 1024 * 1024


@pytest.fixture(params=["xfs", "btrfs"])
def disk(request: pytest.FixtureRequest, mounts: Mounts) -> Path:
    """A root with an overlay in it, on a file system that shares blocks."""
    point = mounts.on_a_loop(request.param, "disk")
    (point / "base").write_bytes(os.urandom(MIB))
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw"]
    subprocess.run([*argv, str(point / "in")], check=True)
    return point


def prepared(
    disk: Path,
    before: Callable[[], object],
    judge: Callable[[sharing.Prospect], str],
    access: values.RootAccess = values.RootAccess.DAEMON,
) -> str:
    """Prepare to share, after `before` and once the chain is open; a verdict, or the reason."""

    def steps(found: list[str]) -> None:
        rules = grants.Rules(roots=(grants.files(disk, access=access),))
        grant = rules.convert(grants.request(disk / "in", disk / "out", "qcow2"))
        setup, (ours, theirs) = whole_job.setup(), channel.Channel.pair()
        with contextlib.ExitStack() as stack, ours, theirs:
            worker = stack.enter_context(execution.opened(setup))
            runner = execution.Runner(worker, context.JobContext(ours, 60.0))
            source = stack.enter_context(paths.open_source(grant.source, grant.peer))
            dest = stack.enter_context(endpoints.open_dest(grant, setup))
            chain = backing_chain.follow(grant, source, runner, stack)
            before()
            opened = endpoints.Endpoints(chain=chain, dest=dest)
            found.append(judge(sharing.prepare(grant, opened, runner, stack)))

    def outcome() -> str:
        found: list[str] = []
        failure = refusals.refusal_of(lambda: steps(found))
        return failure.reason if failure else found[0]

    return in_child(outcome)


def problem_of(prospect: sharing.Prospect) -> str:
    """Why there is no snapshot; empty if there is one."""
    return prospect.problem


def test_snapshot_is_closed_to_everybody_but_the_worker(disk: Path) -> None:
    """Whoever owns the source and the directory; and nobody's quota counts it."""
    for name in ("in", "base", "."):
        os.chown(disk / name, grants.CALLER.uid, grants.CALLER.gid)

    def judge(prospect: sharing.Prospect) -> str:
        for source in prospect.ends.sources:
            status = os.fstat(source.fd)
            assert (status.st_uid, status.st_gid) == (0, whole_job.WORKER.gid)
            assert (stat.S_IMODE(status.st_mode), status.st_nlink) == (0o040, 0)
            assert fcntl.fcntl(source.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        return f"{len(prospect.ends.sources)} closed"

    for access in values.RootAccess.DAEMON, values.RootAccess.CALLER:
        assert prepared(disk, lambda: None, judge, access) == "2 closed"
    assert sorted(os.listdir(disk)) == ["base", "in"]


@pytest.mark.parametrize("access", [values.RootAccess.DAEMON, values.RootAccess.CALLER])
def test_snapshot_has_no_name_where_each_new_file_gets_one(
    disk: Path, access: values.RootAccess
) -> None:
    """A killed job would leave it, root's, which the sweep for the result's owner spares."""
    for name in ("in", "base"):
        os.chown(disk / name, grants.CALLER.uid, grants.CALLER.gid)
    disk.chmod(0o1777)

    def judge(prospect: sharing.Prospect) -> str:
        assert not prospect.problem
        assert [os.fstat(source.fd).st_nlink for source in prospect.ends.sources] == [0, 0]
        return f"{len(os.listdir(disk))} names"

    with failing.o_tmpfile("EOPNOTSUPP"):
        # The two images', and that of the result.
        assert prepared(disk, lambda: None, judge, access) == "3 names"
    assert sorted(os.listdir(disk)) == ["base", "in"]


def test_backing_file_that_was_touched_just_now_is_left_to_qemu_img(disk: Path) -> None:
    """Nova touches the images in its cache, which does not change them."""
    assert prepared(disk, lambda: os.utime(disk / "base"), problem_of) == (
        "the image changed just now"
    )


def test_source_that_changes_before_its_snapshot_is_refused(disk: Path) -> None:
    """What qemu-img said of it may not be true of the snapshot."""

    def write() -> None:
        with (disk / "in").open("r+b") as image:
            image.seek(0, os.SEEK_END)
            image.write(b"more")

    assert prepared(disk, write, problem_of) == "SOURCE_CHANGED"


def test_destination_is_empty_while_there_is_no_more_than_a_snapshot(disk: Path) -> None:
    """The trial whether blocks can be shared leaves nothing."""

    def judge(prospect: sharing.Prospect) -> str:
        assert not prospect.problem
        status = os.fstat(prospect.ends.dest.fd)
        return f"{status.st_size} {status.st_blocks}"

    assert prepared(disk, lambda: None, judge) == "0 0"
