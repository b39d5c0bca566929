"""Whoever could put another directory in the place of a root must be named in the policy."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from harness.callers import ALICE, BOB, owner_of
from harness.daemon import Daemon, DidNotStart
from harness.fixtures import MakeDaemon
from hostile import forged, simple_calls
from policies import Grant, Policy, Root

from convertd_daemon.admin import check
from convertd_daemon.policy import load

IMAGES: Final = Root("images", "{scratch}/parent/images")
POLICY: Final = Policy(grants=[Grant(read=[IMAGES], write=[IMAGES])])

Load = Callable[[Policy], load.Loaded]

KEY: Final = "roots.images.parents_writable_by"


@pytest.fixture
def parent(scratch: Path) -> Iterator[Path]:
    """A directory with a root in it. Both are root's."""
    path = scratch / "parent"
    (path / "images").mkdir(parents=True)
    path.chmod(0o755)
    yield path
    subprocess.run(["rm", "-r", str(path)], check=True)


@pytest.fixture
def loaded(make_daemon: MakeDaemon) -> Load:
    """Load a policy from a file that only root can write."""
    return lambda policy: load.load(str(make_daemon(policy).policy_path))


def allowing(*writers: int | str) -> Policy:
    """The same policy, with these named for the root."""
    return POLICY.with_root(dataclasses.replace(IMAGES, parents_writable_by=writers))


def owned(path: Path) -> None:
    """Give it away."""
    os.chown(path, 1234, 1300)


def group_writable(path: Path) -> None:
    """Let a group write."""
    os.chown(path, 0, 1300)
    path.chmod(0o775)


def listed_user(path: Path) -> None:
    """Let a user write by an access control list."""
    subprocess.run(["setfacl", "-m", "u:1234:rwx", str(path)], check=True)


def listed_group(path: Path) -> None:
    """Let a group write by an access control list; the owning group may not."""
    subprocess.run(["setfacl", "-m", "g:1300:rwx", str(path)], check=True)


def sticky_with_a_root_of_anothers(path: Path) -> None:
    """As /tmp is: an owner may rename what is its own."""
    path.chmod(0o1777)
    os.chown(path / "images", 1234, 1234)


@pytest.mark.parametrize(
    ("give", "named"),
    [
        (owned, 1234),
        (group_writable, "group:1300"),
        (listed_user, 1234),
        (listed_group, "group:1300"),
        (sticky_with_a_root_of_anothers, 1234),
    ],
)
def test_user_who_can_replace_a_root_must_be_named_in_the_policy(
    loaded: Load,
    parent: Path,
    give: Callable[[Path], None],
    named: int | str,
) -> None:
    """And the message says what to write; written so, the policy is taken."""
    loaded(POLICY)
    give(parent)
    with pytest.raises(load.LoadError) as refused:
        loaded(POLICY)
    assert refused.value.key == KEY
    assert f"{parent} can be changed by" in refused.value.reason
    assert refused.value.reason.endswith(f"write: parents_writable_by = [{json.dumps(named)}]")
    loaded(allowing(named))
    with pytest.raises(load.LoadError):
        loaded(allowing(4321, "group:4321"))


def test_all_users_missing_from_the_policy_are_reported_at_once(loaded: Load, parent: Path) -> None:
    """With those that are named already."""
    owned(parent)
    parent.chmod(0o775)
    with pytest.raises(load.LoadError) as refused:
        loaded(allowing(5))
    assert refused.value.reason.endswith('parents_writable_by = [5, 1234, "group:1300"]')


@pytest.mark.parametrize("mode", [0o777, 0o757])
def test_parent_directory_that_everybody_can_write_is_refused(
    loaded: Load, parent: Path, mode: int
) -> None:
    """Nobody can be named for that."""
    parent.chmod(mode)
    with pytest.raises(load.LoadError) as refused:
        loaded(POLICY)
    assert refused.value.reason.endswith(f"take that from them: chmod o-w {parent}")


def test_root_owned_by_root_in_a_sticky_directory_is_accepted(loaded: Load, parent: Path) -> None:
    """Nobody but root can rename it."""
    parent.chmod(0o1777)
    loaded(POLICY)


def test_missing_root_that_anybody_could_create_is_refused(parent: Path) -> None:
    """A sticky directory keeps nobody from making what is not there."""
    policy = POLICY.with_root(dataclasses.replace(IMAGES, path=str(parent / "images")))
    (parent / "images").rmdir()
    parent.chmod(0o1777)
    daemon_policy = parent.parent / "policy.toml"
    daemon_policy.write_text(str(policy), encoding="utf-8")
    with pytest.raises(load.LoadError) as refused:
        load.load(str(daemon_policy))
    daemon_policy.unlink()
    assert refused.value.key == KEY
    # Not: take the permission away, which a directory as /tmp must have.
    assert refused.value.reason.endswith("it is not there: make it first")


def test_root_directory_may_have_any_owner_and_mode(loaded: Load, parent: Path) -> None:
    """It is there to be written."""
    (parent / "images").chmod(0o777)
    os.chown(parent / "images", 1234, 1234)
    loaded(POLICY)


def test_root_with_caller_access_needs_no_named_users(loaded: Load, parent: Path) -> None:
    """The kernel asks for them wherever the files are; to name somebody would mean nothing."""
    owned(parent)
    root = dataclasses.replace(IMAGES, access="caller")
    loaded(POLICY.with_root(root))
    with pytest.raises(load.LoadError) as refused:
        loaded(POLICY.with_root(dataclasses.replace(root, parents_writable_by=[ALICE.uid])))
    assert refused.value.key == KEY
    assert "has no meaning" in refused.value.reason


NESTED: Final = Policy(
    roots=[dataclasses.replace(IMAGES, access="caller")],
    grants=[Grant(read=[Root("around", "{scratch}/parent")])],
)


def test_nested_root_inside_a_root_with_daemon_access_is_checked_too(
    loaded: Load, parent: Path
) -> None:
    """Renamed, its files would be read with the daemon's rights."""
    loaded(NESTED)
    owned(parent)
    with pytest.raises(load.LoadError) as refused:
        loaded(NESTED)
    assert refused.value.key == KEY
    root = dataclasses.replace(IMAGES, access="caller", parents_writable_by=[ALICE.uid])
    loaded(NESTED.with_root(root))


def test_owner_of_a_root_of_devices_is_checked_too(loaded: Load) -> None:
    """Links are followed there: whoever could make one could choose any device."""
    path = Path("/dev/shm/convertd-test")  # noqa: S108 - below /dev, and not root's alone
    policy = Policy(grants=[Grant(read=[Root("volumes", str(path), kind="block")])])
    path.mkdir()
    try:
        loaded(policy)
        os.chown(path, 1234, 1234)
        with pytest.raises(load.LoadError) as refused:
            loaded(policy)
    finally:
        path.rmdir()
    assert refused.value.key == "roots.volumes.parents_writable_by"


def test_unknown_user_in_the_list_of_named_users_is_a_mistake(loaded: Load, parent: Path) -> None:
    """To `check`; and nobody is allowed by it."""
    assert parent.is_dir()
    warnings = loaded(allowing("no-such-user")).warnings
    assert [str(one).partition(": ")[2] for one in warnings] == [
        f"{KEY}[0]: there is no user no-such-user"
    ]
    owned(parent)
    with pytest.raises(load.LoadError):
        loaded(allowing("no-such-user"))


def test_check_reports_who_can_replace_a_root(
    make_daemon: MakeDaemon, parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the daemon does not start."""
    owned(parent)
    daemon = make_daemon(POLICY)
    assert check.run(str(daemon.policy_path)) == 1
    assert f"{KEY}: {parent} can be changed by uid 1234" in capsys.readouterr().err
    with pytest.raises(DidNotStart, match="parents_writable_by"):
        daemon.start()
    assert check.run(str(make_daemon(allowing(ALICE.uid)).policy_path)) == 0
    told = "The directories above can be changed by uid 1234."
    assert told in capsys.readouterr().out


def test_root_whose_parent_changed_owner_after_the_load_is_refused(
    make_daemon: MakeDaemon, parent: Path
) -> None:
    """Each job looks again; and when it was taken back, goes on."""
    images = parent / "images"
    os.chown(images, ALICE.uid, ALICE.gid)
    source = simple_calls.file_of(BOB, images / "disk.raw", b"x" * forged.SIZE)
    daemon = make_daemon(POLICY)
    daemon.start()
    owned(parent)
    for answer in (
        simple_calls.convert(daemon, source, images / "out.raw", "raw"),
        simple_calls.inspect(daemon, source, "raw"),
    ):
        assert (answer.status, answer.reason) == ("FAILED_PRECONDITION", "ROOT_UNUSABLE")
        assert f"{parent} can be changed by uid 1234" in answer.message
    os.chown(parent, 0, 0)
    assert simple_calls.convert(daemon, source, images / "out.raw", "raw").is_ok


def test_named_owner_of_the_parent_directory_can_convert(
    make_daemon: MakeDaemon, parent: Path
) -> None:
    """As Nova does, whose user owns /var/lib/nova and all in it."""
    images = parent / "images"
    os.chown(parent, ALICE.uid, ALICE.gid)
    os.chown(images, ALICE.uid, ALICE.gid)
    source = simple_calls.file_of(BOB, images / "disk.raw", b"x" * forged.SIZE)
    daemon: Daemon = make_daemon(allowing(ALICE.uid))
    daemon.start()
    assert simple_calls.convert(daemon, source, images / "out.raw", "raw").is_ok
    assert owner_of(images / "out.raw")[:2] == (ALICE.uid, ALICE.gid)
