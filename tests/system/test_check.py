"""`convertd check`: in words who may do what, and exit status 1 with file, key and reason."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from policies import Grant, Policy, Root

from convertd_daemon.admin import check

if TYPE_CHECKING:
    from collections.abc import Iterator

IMAGES: Final = Root(
    "images", "{directory}/images", owner="root:0", mode="0640", mounts=True, allow_ownerless=True
)
OWN: Final = Root("own", "{directory}/own", access="caller", reflink=False)
VOLUMES: Final = Root("volumes", "/dev/no-such-group-of-volumes", kind="block")
POLICY = Policy(
    limits={"stop_grace": "0 s"},
    operators=["root"],
    roots=[IMAGES, OWN, VOLUMES],
    grants=[
        Grant(
            users=["root", 1234],
            groups=["root"],
            read=[IMAGES, VOLUMES],
            write=[OWN],
            read_formats=["vmdk"],
            overwrite="any",
        ),
        Grant(users=None, groups=[36], read=[OWN]),
    ],
)

DESCRIPTION = """\
{directory}/policy.toml:

Roots
  images: image files in {directory}/images
    The daemon opens them with its own rights, whoever owns them.
    Created files belong to uid 0, gid 0, mode 0640 unless the request says otherwise.
    What is mounted below can be used.
    Where the file system keeps no owner or mode, files are created with a warning.
    Results can share blocks with their sources.
  own: image files in {directory}/own
    The daemon opens them with the caller's rights.
    Created files belong to the caller, mode 0600 unless the request says otherwise.
    What is mounted below can't be used.
    Where the file system keeps no owner or mode, nothing is created.
    Results can't share blocks with their sources.
  volumes: block devices in /dev/no-such-group-of-volumes
    The daemon opens them with its own rights, whoever owns them.
    Nothing is created here.
    The daemon does not believe a caller who says that a device reads as zeroes.

Grants
  grants[0]: user root (uid 0) or uid 1234 or any member of group root (gid 0) may
    read vmdk in images, volumes
    write qcow2, raw in own
    replace any existing file, if the request asks for it.
  grants[1]: any member of gid 36 may
    read qcow2, raw in own
    write nothing: it may inspect images, but not convert them.

Operators
  user root (uid 0) may see and cancel every job. This gives no right to convert.

Limits, at most
  4 conversions at once, 2 of one user
  64 conversions that wait, 32 of one user
  8 inspections at once, 4 of one user
  30 s for an inspection
  1024 connections, 128 of one user
  2 TiB of virtual size
  1 GiB of memory for qemu-img
  10 min without progress, 1 d in all
  0 s for running jobs when the daemon is stopped

Service
  counters: no file
    keeps running without work

Program
  /usr/bin/qemu-img
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that, with all above it, only root can write; with the roots of the policy."""
    path = Path(tempfile.mkdtemp(prefix="convertd-test-", dir="/run"))
    (path / "images").mkdir()
    (path / "own").mkdir()
    yield path
    shutil.rmtree(path)


def checked(directory: Path, policy: Policy | str = POLICY) -> int:
    """The exit status for a policy."""
    path = directory / "policy.toml"
    path.write_text(str(policy).replace("{directory}", str(directory)), encoding="utf-8")
    return check.run(str(path))


def test_check_describes_the_policy_in_words(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every root, grant and operator, with whose rights."""
    checked(directory)
    assert capsys.readouterr().out == DESCRIPTION.replace("{directory}", str(directory))


def test_check_of_an_empty_policy_says_that_nobody_is_granted_anything(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says so."""
    checked(directory, Policy())
    output = capsys.readouterr().out
    assert "Grants\n  none: nobody may convert anything\n" in output
    assert "nobody: each caller sees and cancels its own jobs only.\n" in output


def test_check_passes_a_policy_with_a_missing_root(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A root that is not there is told: it may yet be mounted or made."""
    assert checked(directory) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{directory}/policy.toml: roots.volumes.path: /dev/no-such-group")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("[limits]\njobs = 0", "limits.jobs: must be from 1 to 256", id="limit"),
        pytest.param(
            '[operators]\ngroups = ["no-such-group"]',
            "operators.groups[0]: there is no group no-such-group",
            id="name",
        ),
    ],
)
def test_check_reports_a_mistake_with_file_and_key_in_a(
    directory: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    """And the exit status is 1."""
    assert checked(directory, text) == 1
    assert capsys.readouterr().err == f"{directory}/policy.toml: {message}\n"


def test_check_marks_an_unknown_user_in_the_description(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where one reads who may do what."""
    checked(directory, Policy(operators=["no-such-user"]))
    assert "user no-such-user (which does not exist) may see" in capsys.readouterr().out


def test_check_describes_a_root_with_an_unknown_owner_as_closed(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No grant reaches it."""
    assert (
        checked(directory, POLICY.with_root(dataclasses.replace(IMAGES, owner="no-such-user:0")))
        == 1
    )
    assert "read vmdk in volumes\n" in capsys.readouterr().out


def test_check_reports_a_missing_qemu_img(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The daemon would not start."""
    assert checked(directory, Policy(qemu_img="/no/such/program")) == 1
    assert capsys.readouterr().err.startswith("/no/such/program: No such file or directory")


def test_check_reports_a_root_that_is_a_file_or_behind_a_symlink(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing in it could be opened."""
    (directory / "own").rmdir()
    (directory / "own").symlink_to(directory / "images")
    (directory / "images").rmdir()
    (directory / "images").write_text("", encoding="ascii")
    checked(directory)
    output = capsys.readouterr().err
    assert f"roots.images.path: {directory}/images is not a directory\n" in output
    (directory / "images").unlink()
    (directory / "images").mkdir()
    checked(directory)
    output = capsys.readouterr().err
    assert f"roots.own.path: {directory}/own has a symbolic link in its path" in output


def counters_in(directory: Path) -> Policy:
    """A policy with a file of counters in there."""
    return Policy(service={"metrics": f"{directory}/convertd.prom"})


def test_check_accepts_a_counters_directory_that_only_root_can_write(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing is said of it."""
    assert checked(directory, counters_in(directory / "own")) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("mode", "owner", "problem"),
    [
        pytest.param(0o775, 0, "can be changed by members of gid 0", id="its-group"),
        pytest.param(0o1777, 0, "can be changed by everybody", id="all"),
        pytest.param(0o755, 1234, "can be changed by uid 1234", id="its-owner"),
    ],
)
def test_check_reports_a_counters_directory_that_can_be_written_by(
    directory: Path, capsys: pytest.CaptureFixture[str], mode: int, owner: int, problem: str
) -> None:
    """Whoever that is could replace the counters."""
    (directory / "own").chmod(mode)
    os.chown(directory / "own", owner, 0)
    assert checked(directory, counters_in(directory / "own")) == 1
    output = capsys.readouterr().err
    assert f"service.metrics: {directory}/own {problem}" in output


def test_check_reports_who_can_rename_the_counters_directory(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Debian has it, where user prometheus owns the one above: no reason to fail."""
    inner = directory / "own" / "inner"
    inner.mkdir()
    os.chown(directory / "own", 1234, 0)
    assert checked(directory, counters_in(inner)) == 0
    output = capsys.readouterr().err
    assert f"service.metrics: {directory}/own can be changed by uid 1234" in output


@pytest.mark.parametrize("kind", ["missing", "link", "file", "taken"])
def test_check_reports_counters_that_can_not_be_written(
    directory: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """The directory is not there, or is none, or the file's name is a directory's."""
    place = directory / "export"
    match kind:
        case "link":
            place.symlink_to(directory / "own")
        case "file":
            place.touch()
        case "taken":
            (place / "convertd.prom").mkdir(parents=True)
    assert checked(directory, counters_in(place)) == 1
    assert f"service.metrics: {place}" in capsys.readouterr().err
