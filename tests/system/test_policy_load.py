"""The policy file on a real file system, and real lookups of names."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from descriptors import none_left_open
from policies import Grant, Policy, Root

from convertd_daemon.policy import bind, load, lookup

if TYPE_CHECKING:
    from collections.abc import Iterator

POLICY = Policy(
    grants=[
        Grant(
            users=["root", "no-such-user"],
            groups=["root", "no-such-group"],
            read=[Root("images", "/srv/images")],
        )
    ]
)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that, with all above it, only root can write: not so /tmp."""
    path = Path(tempfile.mkdtemp(prefix="convertd-test-", dir="/run"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def file(directory: Path) -> Path:
    """A policy that is fine."""
    path = directory / "policy.toml"
    path.write_text(str(POLICY), encoding="utf-8")
    path.chmod(0o644)
    return path


def refusal(path: Path | str) -> load.LoadError:
    """Why a policy is not taken; and it leaves no descriptor open."""
    with none_left_open(), pytest.raises(load.LoadError) as refused:
        load.load(str(path))
    return refused.value


def test_policy_is_loaded_with_user_names_resolved(file: Path) -> None:
    """What does not exist is a warning, and grants nobody."""
    loaded = load.load(str(file))
    assert loaded.policy.rules[0].subjects.uids == loaded.policy.rules[0].subjects.gids == {0}
    assert [str(warning) for warning in loaded.warnings] == [
        f"{file}: grants[0].users[1]: there is no user no-such-user",
        f"{file}: grants[0].groups[1]: there is no group no-such-group",
    ]


def test_relative_policy_path_is_resolved_from_the_working_directory(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the messages name the whole of it."""
    monkeypatch.chdir(file.parent)
    assert load.load(file.name).file == str(file)


def test_policy_mistake_is_reported_as_file_key_and_reason(file: Path) -> None:
    """In this order, parted by colons."""
    file.write_text("[limits]\njobs = 0", encoding="utf-8")
    refused = refusal(file)
    assert (refused.file, refused.key) == (str(file), "limits.jobs")
    assert str(refused) == f"{file}: limits.jobs: must be from 1 to 256"


def test_policy_with_the_user_nobody_is_refused(file: Path) -> None:
    """`nobody` is the uid that every unmapped one reads as."""
    assert pwd.getpwnam("nobody").pw_uid == 65534
    file.write_text('[operators]\nusers = ["nobody"]', encoding="utf-8")
    assert refusal(file).key == "operators.users[0]"


@pytest.mark.parametrize(
    ("mode", "who"), [(0o664, "members of gid 0"), (0o646, "everybody"), (0o777, "everybody")]
)
def test_policy_file_that_others_can_write_is_refused_and_they_are_named(
    file: Path, mode: int, who: str
) -> None:
    """They would decide who may do what."""
    file.chmod(mode)
    assert f"{file} can be changed by {who}" in str(refusal(file))


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_policy_below_a_directory_that_others_can_write_is_refused(
    directory: Path, mode: int
) -> None:
    """They could put another file in its place. A sticky bit is no excuse."""
    above = directory / "etc"
    (above / "convertd").mkdir(parents=True)
    file = above / "convertd" / "policy.toml"
    file.write_text(str(POLICY), encoding="utf-8")
    assert load.load(str(file)).file
    above.chmod(mode)
    assert f"{above} can be changed by" in str(refusal(file))


def test_policy_with_an_acl_that_lets_others_write_is_refused(file: Path) -> None:
    """Whoever it names."""
    subprocess.run(["setfacl", "-m", "u:1234:rw", str(file)], check=True)
    assert f"{file} can be changed by uid 1234" in str(refusal(file))


@pytest.mark.parametrize("which", ["file", "directory"])
def test_policy_owned_by_another_user_is_refused(file: Path, which: str) -> None:
    """An owner can give itself the right to write."""
    owned = {"file": file, "directory": file.parent}[which]
    os.chown(owned, 1234, 1234)
    assert f"{owned} can be changed by uid 1234" in str(refusal(file))


def test_policy_file_that_is_a_symlink_is_refused(directory: Path, file: Path) -> None:
    """Whoever has the link would choose the policy."""
    link = directory / "link.toml"
    link.symlink_to(file)
    assert f"{link} is a symbolic link" in str(refusal(link))


def test_policy_path_through_a_symlink_is_refused(directory: Path, file: Path) -> None:
    """Nor here."""
    (directory / "real").mkdir()
    (directory / "link").symlink_to(directory / "real")
    file.rename(directory / "real" / "policy.toml")
    assert f"{directory}/link is a symbolic link" in str(
        refusal(directory / "link" / "policy.toml")
    )


def test_missing_policy_file_is_reported_by_name(directory: Path) -> None:
    """By the name that is missing."""
    missing = directory / "no" / "policy.toml"
    assert str(refusal(missing)) == f"{missing}: {directory}/no: No such file or directory"


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_policy_path_that_is_not_a_regular_file_is_refused_without_blocking(
    directory: Path, kind: str
) -> None:
    """Opening a FIFO would wait for its writer."""
    path = directory / "policy.toml"
    {"directory": path.mkdir, "fifo": lambda: os.mkfifo(path)}[kind]()
    assert "is not a regular file" in str(refusal(path))


def test_policy_file_over_the_size_limit_is_refused(file: Path) -> None:
    """A policy has a page, not a megabyte."""
    file.write_text("#" * (load.MAX_BYTES + 1), encoding="ascii")
    assert "is larger than 1048576 bytes" in str(refusal(file))


def test_policy_file_at_the_size_limit_is_read(file: Path) -> None:
    """To its last byte."""
    file.write_text(str(POLICY).rjust(load.MAX_BYTES), encoding="ascii")
    assert len(load.load(str(file)).policy.rules) == 1


def test_failed_name_lookup_fails_the_policy_load() -> None:
    """An answer that is not whole is none: it would grant less, or more, than it should."""
    wanted = bind.NeededNames(users=frozenset({"root", "a\0b"}))
    with pytest.raises(lookup.LookupFailed, match="broke off"):
        lookup.resolve(wanted)


HANGING = """
    import os, socket
    from convertd_daemon.policy import load
    # The C library asks nscd first, waits for its answer for five seconds, and then finds root.
    os.mkdir("/run/nscd")
    nscd = socket.socket(socket.AF_UNIX)
    nscd.bind("/run/nscd/socket")
    nscd.listen()
    with open("/run/policy.toml", "w") as file:
        file.write('[operators]\\nusers = ["root"]')
    try:
        load.load("/run/policy.toml", limit_s=0.5)
    except load.LoadError as error:
        print(error)
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        print("no child is left")
"""


def test_unresponsive_name_service_ends_in_a_timeout() -> None:
    """In a mount namespace of its own, nscd accepts and never answers."""
    script = textwrap.dedent(HANGING)
    inside = f'mount -t tmpfs -o mode=755 none /run && exec "{sys.executable}" -c "$0"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", inside, script],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [
        "/run/policy.toml: users and groups could not be looked up in time",
        "no child is left",
    ]
