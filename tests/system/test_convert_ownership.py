"""Whose the result is, and with whose rights files are opened: both values of `access`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

import pytest
from harness import images
from harness.agent import Agent, conversion
from harness.callers import ALICE, BOB, owner_of
from harness.daemon import Daemon
from policies import IMAGES, Grant, Policy, Root

OWNED: Final = Root("owned", "{scratch}/owned", owner="1500:1600", mode="0644")
OWN: Final = Root("own", "{scratch}/own", access="caller")
POLICY: Final = Policy(
    grants=[
        Grant(users=[1234, 1235], read=[IMAGES, OWN], write=[IMAGES, OWNED, OWN], overwrite="any")
    ]
)


@pytest.fixture
def alice(daemon: Daemon) -> Agent:
    """Calls as uid 1234, a member of the groups 1234, 1300 and 1400."""
    return daemon.agent(ALICE)


@pytest.fixture
def own_dir(scratch: Path, request: pytest.FixtureRequest) -> Path:
    """A directory of uid 1234's in the root whose files are opened with the caller's rights."""
    path = scratch / "own" / str(request.node.name)
    path.mkdir(parents=True, mode=0o755)
    os.chown(path, ALICE.uid, ALICE.gid)
    return path


@pytest.fixture
def own_source(own_dir: Path) -> Path:
    """An image of uid 1234's in there."""
    path = images.small(own_dir / "source.raw")
    os.chown(path, ALICE.uid, ALICE.gid)
    return path


@pytest.fixture
def source(images_dir: Path) -> Path:
    """An image that root alone may read."""
    return images.small(images_dir / "source.raw")


# --- what is made -------------------------------------------------------------------------------


def test_result_belongs_to_its_caller_only(
    alice: Agent, daemon: Daemon, source: Path, images_dir: Path
) -> None:
    """Each caller's own, as the kernel names it."""
    alice.convert(conversion(source, images_dir / "alice.qcow2")).result()
    daemon.agent(BOB).convert(conversion(source, images_dir / "bob.qcow2")).result()
    assert owner_of(images_dir / "alice.qcow2") == (1234, 1234, 0o600)
    assert owner_of(images_dir / "bob.qcow2") == (1235, 1235, 0o600)


@pytest.mark.parametrize("mode", [0o000, 0o640, 0o666], ids=oct)
def test_result_has_the_requested_mode(
    alice: Agent, source: Path, images_dir: Path, mode: int
) -> None:
    """No umask takes from it, and nothing adds to it."""
    dest = images_dir / "dest.qcow2"
    alice.convert(conversion(source, dest, mode=mode)).result()
    assert owner_of(dest) == (1234, 1234, mode)


def test_convertctl_accepts_the_mode_in_octal(
    daemon: Daemon, source: Path, images_dir: Path
) -> None:
    """As chmod does."""
    dest = images_dir / "dest.qcow2"
    arguments = ("convert", str(source), str(dest), "-f", "raw", "-O", "qcow2", "--mode", "0640")
    ran = ALICE.convertctl(daemon.socket, *arguments)
    assert ran.status == 0, ran
    assert owner_of(dest) == (1234, 1234, 0o640)


def test_result_has_the_requested_group(alice: Agent, source: Path, images_dir: Path) -> None:
    """One of the caller's supplementary groups, which the kernel told at connect."""
    dest = images_dir / "dest.qcow2"
    alice.convert(conversion(source, dest, group="1300", mode=0o640)).result()
    assert owner_of(dest) == (1234, 1300, 0o640)


def test_result_in_a_setgid_directory_has_the_directory_group(
    alice: Agent, source: Path, images_dir: Path
) -> None:
    """As open(2) would, even a group that the caller is not in; an explicit group goes first."""
    os.chown(images_dir, 0, 1700)
    images_dir.chmod(0o2755)
    alice.convert(conversion(source, images_dir / "one.qcow2")).result()
    alice.convert(conversion(source, images_dir / "two.qcow2", group="1400")).result()
    assert owner_of(images_dir / "one.qcow2") == (1234, 1700, 0o600)
    assert owner_of(images_dir / "two.qcow2") == (1234, 1400, 0o600)


def test_root_setting_defines_owner_and_mode_of_results(
    alice: Agent, source: Path, scratch: Path
) -> None:
    """And which mode they have, if the caller names none."""
    alice.convert(conversion(source, scratch / "owned" / "one.qcow2")).result()
    alice.convert(conversion(source, scratch / "owned" / "two.qcow2", mode=0o600)).result()
    assert owner_of(scratch / "owned" / "one.qcow2") == (1500, 1600, 0o644)
    assert owner_of(scratch / "owned" / "two.qcow2") == (1500, 1600, 0o600)


def test_default_acl_is_inherited_within_the_requested_mode(
    alice: Agent, source: Path, images_dir: Path
) -> None:
    """As open(2) would: the mode that was asked for, or the root's, bounds every entry of it."""
    subprocess.run(["setfacl", "-d", "-m", "u:1666:rw,g:1700:rw", str(images_dir)], check=True)
    expected = {
        0o640: "u::rw-,u:1666:rw-,g::r-x,g:1700:rw-,m::r--,o::---",
        None: "u::rw-,u:1666:rw-,g::r-x,g:1700:rw-,m::---,o::---",
    }
    for mode, entries in expected.items():
        dest = images_dir / f"{mode}.qcow2"
        request = conversion(source, dest)
        if mode is not None:
            request.dest.mode = mode
        alice.convert(request).result()
        assert owner_of(dest) == (1234, 1234, 0o600 if mode is None else mode)
        getfacl = ["getfacl", "--omit-header", "--absolute-names", "--no-effective", "--numeric"]
        said = subprocess.run([*getfacl, str(dest)], check=True, capture_output=True, text=True)
        short = [
            line.replace("user:", "u:").replace("group:", "g:") for line in said.stdout.split()
        ]
        short = [line.replace("mask:", "m:").replace("other:", "o:") for line in short]
        assert ",".join(short) == entries


# --- access = "daemon" --------------------------------------------------------------------------


def test_daemon_access_reads_any_file_in_the_root(
    alice: Agent, source: Path, images_dir: Path
) -> None:
    """Whosever it is, and although neither the caller nor qemu-img's user could open it."""
    source.chmod(0)
    os.chown(source, BOB.uid, BOB.gid)
    images_dir.chmod(0o700)
    alice.convert(conversion(source, images_dir / "dest.qcow2")).result()
    assert images.identical(source, images_dir / "dest.qcow2")


# --- access = "caller" --------------------------------------------------------------------------


def test_caller_access_reads_and_writes_files_of_the_caller(
    alice: Agent, own_source: Path, own_dir: Path
) -> None:
    """In a directory of its own, which nobody else could even search."""
    own_dir.chmod(0o700)
    alice.convert(conversion(own_source, own_dir / "dest.qcow2")).result()
    assert owner_of(own_dir / "dest.qcow2") == (1234, 1234, 0o600)
    assert images.identical(own_source, own_dir / "dest.qcow2")


def test_caller_access_reads_a_file_readable_by_a_supplementary_group(
    alice: Agent, own_source: Path, own_dir: Path
) -> None:
    """Supplementary groups count."""
    os.chown(own_source, BOB.uid, 1300)
    own_source.chmod(0o040)
    alice.convert(conversion(own_source, own_dir / "dest.qcow2")).result()
    assert images.identical(own_source, own_dir / "dest.qcow2")


@pytest.mark.parametrize(
    ("owner", "mode"),
    [
        pytest.param((0, 0), 0o600, id="root's"),
        pytest.param((BOB.uid, BOB.gid), 0o660, id="another user's"),
        pytest.param((ALICE.uid, ALICE.gid), 0o066, id="own, but closed to oneself"),
        pytest.param((BOB.uid, 1300), 0o606, id="one's group's, but closed to the group"),
    ],
)
def test_caller_access_refuses_a_source_the_caller_can_not_read(
    alice: Agent, own_source: Path, own_dir: Path, owner: tuple[int, int], mode: int
) -> None:
    """The kernel decides, as it would for the caller's own open(2)."""
    os.chown(own_source, *owner)
    own_source.chmod(mode)
    refusal = alice.convert(conversion(own_source, own_dir / "dest.qcow2")).refusal()
    assert (refusal.status, refusal.reason) == ("FAILED_PRECONDITION", "ACCESS_REFUSED")
    assert refusal.metadata == {"path": str(own_source), "rights": "uid 1234"}
    assert not (own_dir / "dest.qcow2").exists()


def test_caller_access_creates_nothing_where_the_caller_can_not_write(
    alice: Agent, own_source: Path, own_dir: Path
) -> None:
    """A directory that is another's."""
    os.chown(own_dir, BOB.uid, BOB.gid)
    refusal = alice.convert(conversion(own_source, own_dir / "dest.qcow2")).refusal()
    assert refusal.reason == "ACCESS_REFUSED"
    assert refusal.metadata == {"path": str(own_dir / "dest.qcow2"), "rights": "uid 1234"}


@pytest.mark.parametrize("end", ["source", "dest"])
def test_caller_access_hides_names_in_a_directory_closed_to_the_caller(
    alice: Agent, own_source: Path, own_dir: Path, end: str
) -> None:
    """A directory that the caller may not search gives one answer, whatever is in it."""
    closed = own_dir / "closed"
    closed.mkdir()
    closed.chmod(0o700)
    there = images.small(closed / "there.raw")
    answers = []
    for path in (there, closed / "missing.raw"):
        request = {
            "source": conversion(path, own_dir / "dest.qcow2"),
            "dest": conversion(own_source, path, dest_format="raw"),
        }[end]
        refusal = alice.convert(request).refusal()
        assert refusal.metadata.pop("path") == str(path)
        answers.append((refusal.status, refusal.reason, refusal.metadata))
    assert answers[0] == answers[1]
    assert answers[0][1] == "ACCESS_REFUSED"


def test_caller_access_does_not_replace_others_files_in_a_sticky_directory(
    alice: Agent, own_source: Path, own_dir: Path
) -> None:
    """The policy lets any file be overwritten; the kernel does not."""
    os.chown(own_dir, 0, 0)
    own_dir.chmod(0o1777)
    dest = images.small(own_dir / "dest.raw")
    os.chown(dest, BOB.uid, BOB.gid)
    before = dest.stat()
    call = alice.convert(conversion(own_source, dest, dest_format="raw", overwrite=True))
    assert call.refusal().reason == "ACCESS_REFUSED"
    assert dest.stat() == before
    assert sorted(os.listdir(own_dir)) == ["dest.raw", "source.raw"]


def test_caller_access_replaces_others_files_where_the_kernel_allows_it(
    alice: Agent, own_source: Path, own_dir: Path
) -> None:
    """In one's own directory one may rename over anything: also over what one can't read."""
    dest = own_dir / "dest.raw"
    dest.write_bytes(b"another's")
    dest.chmod(0o600)
    result = alice.convert(conversion(own_source, dest, dest_format="raw", overwrite=True)).result()
    assert result.replaced
    assert owner_of(dest) == (1234, 1234, 0o600)
