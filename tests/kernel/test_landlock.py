"""Landlock: everything the kernel knows is denied, what a rule names is not."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from children import errno_of, in_child, no_new_privs
from descriptors import none_left_open

from convertd_daemon.linux import landlock as kernel_landlock
from convertd_daemon.linux import syscall
from convertd_daemon.linux.landlock import AccessFs, AccessNet, Scope
from convertd_daemon.sandbox import errors, landlock

BLKGETSIZE64 = 0x80081272


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Give a directory with two files."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "other").write_text("other")
    return tmp_path


def test_all_landlock_rights_of_the_running_kernel_are_denied() -> None:
    """A generation that our table lacks would go unnoticed otherwise."""
    newest = landlock.GENERATIONS[-1]
    assert kernel_landlock.abi() >= newest.abi, "run these tests on a newer kernel"
    every = 0
    for bit in range(64):
        with contextlib.suppress(OSError):
            os.close(
                kernel_landlock.create_ruleset(
                    fs=AccessFs(1 << bit), net=AccessNet(0), scope=Scope(0)
                )
            )
            every |= 1 << bit
    known = 0
    for generation in landlock.GENERATIONS:
        known |= generation.fs
    assert known == every


def test_each_later_landlock_right_has_a_substitute() -> None:
    """The table of what denies it where Landlock can't."""
    assert set(landlock.STAND_INS) == {generation.abi for generation in landlock.GENERATIONS[1:]}


@pytest.mark.parametrize("abi", [1, 2, 3, 4, 5, 6, None])
def test_landlock_allows_reading_the_named_inode_only(place: Path, abi: int | None) -> None:
    """On every Landlock there has been; also through /proc/self/fd."""
    mine = os.open(place / "mine", os.O_PATH)

    def act() -> list[str]:
        landlock.restrict([landlock.Rule(where=mine, access=landlock.READ)], abi=abi)
        return [
            errno_of(lambda: os.open(place / "mine", os.O_RDONLY)),
            errno_of(lambda: os.open(f"/proc/self/fd/{mine}", os.O_RDONLY)),
            errno_of(lambda: os.open(place / "mine", os.O_RDWR)),
            errno_of(lambda: os.open(place / "other", os.O_RDONLY)),
            errno_of(lambda: os.listdir(place)),
            errno_of(lambda: os.open(place / "new", os.O_CREAT | os.O_WRONLY)),
            errno_of(lambda: os.unlink(place / "other")),
            errno_of(lambda: os.rename(place / "other", place / "new")),
            errno_of(lambda: os.link(place / "other", place / "new")),
            errno_of(lambda: os.mkdir(place / "new")),
            errno_of(lambda: os.execv("/bin/true", ["true"])),
        ]

    assert in_child(act) == ["done", "done", *["EACCES"] * 9]


@pytest.mark.parametrize(("abi", "expected"), [(2, "done"), (3, "EACCES")])
def test_landlock_denies_truncate_by_path_from_abi_3(place: Path, abi: int, expected: str) -> None:
    """Below that, seccomp stands in."""

    def act() -> str:
        landlock.restrict([], abi=abi)
        return errno_of(lambda: os.truncate(place / "other", 0))

    assert in_child(act) == expected


@pytest.mark.parametrize(("abi", "expected"), [(3, "ECONNREFUSED"), (4, "EACCES")])
def test_landlock_denies_tcp_from_abi_4(abi: int, expected: str) -> None:
    """Below that, seccomp stands in."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()

    def act() -> str:
        landlock.restrict([], abi=abi)
        with socket.socket() as client:
            return errno_of(lambda: client.connect(address))

    assert in_child(act) == expected


@pytest.mark.parametrize(("abi", "expected"), [(4, "ENOTTY"), (5, "EACCES")])
def test_landlock_denies_device_ioctl_from_abi_5(abi: int, expected: str) -> None:
    """/dev/null is one that qemu-img may read and write."""

    def act() -> str:
        landlock.restrict([landlock.Rule(where="/dev/null", access=landlock.WRITE)], abi=abi)
        with open("/dev/null", "r+b") as device:
            return errno_of(lambda: fcntl.ioctl(device, BLKGETSIZE64, bytes(8)))

    assert in_child(act) == expected


def test_landlock_allows_ioctl_on_a_named_device() -> None:
    """IOCTL_DEV is in DEVICE."""

    def act() -> str:
        landlock.restrict([landlock.Rule(where="/dev/null", access=landlock.DEVICE)])
        with open("/dev/null", "r+b") as device:
            return errno_of(lambda: fcntl.ioctl(device, BLKGETSIZE64, bytes(8)))

    assert in_child(act) == "ENOTTY"


@pytest.fixture
def abstract_name() -> Iterator[str]:
    """Give the name of an abstract socket that somebody outside listens on."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("")
        server.listen()
        yield server.getsockname().decode()


@pytest.mark.parametrize(
    ("abi", "expected"), [(5, ["done", "done"]), (6, ["EPERM", "EPERM"]), (None, ["EPERM"] * 2)]
)
def test_landlock_denies_signals_and_abstract_sockets_from_abi_6(
    abstract_name: str, abi: int | None, expected: list[str]
) -> None:
    """Below that, an own uid and seccomp stand in."""
    parent = os.getpid()

    def act() -> list[str]:
        landlock.restrict([], abi=abi)
        with socket.socket(socket.AF_UNIX) as client:
            return [
                errno_of(lambda: os.kill(parent, 0)),
                errno_of(lambda: client.connect(abstract_name)),
            ]

    assert in_child(act) == expected


def test_landlock_allows_signals_to_own_children() -> None:
    """A job ends its qemu-img, which is in the same domain or one below."""

    def act() -> int:
        landlock.restrict([])
        pid = os.fork()
        if pid == 0:
            landlock.restrict([])
            signal.pause()
        os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]

    assert in_child(act) == signal.SIGKILL


def test_landlock_allows_publishing_in_the_named_directory_only(place: Path) -> None:
    """An unnamed inode, linked, renamed over another, removed; and nothing elsewhere."""
    (place / "dest").mkdir()
    dest = os.open(place / "dest", os.O_RDONLY | os.O_DIRECTORY)

    def publish() -> None:
        unnamed = os.open(place / "dest", os.O_TMPFILE | os.O_RDWR, 0o600)
        source = f"/proc/self/fd/{unnamed}"
        os.link(source, "temporary", dst_dir_fd=dest, follow_symlinks=True)
        os.rename("temporary", "image", src_dir_fd=dest, dst_dir_fd=dest)
        os.unlink("image", dir_fd=dest)
        os.fsync(dest)
        os.listdir(dest)

    def act() -> list[str]:
        landlock.restrict([landlock.Rule(where=dest, access=landlock.PUBLISH_IN)])
        return [
            errno_of(publish),
            errno_of(lambda: os.open(place, os.O_TMPFILE | os.O_RDWR, 0o600)),
            errno_of(lambda: os.mkdir("sub", dir_fd=dest)),
            errno_of(lambda: os.mkfifo("fifo", dir_fd=dest)),
            errno_of(lambda: os.symlink("a", "link", dir_fd=dest)),
        ]

    assert in_child(act) == ["done", *["EACCES"] * 4]


def test_missing_landlock_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no best effort."""

    def absent(name: str, *_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, name)

    monkeypatch.setattr(syscall, "call", absent)
    assert kernel_landlock.abi() == 0
    with pytest.raises(errors.LandlockMissing, match="no landlock"):
        landlock.restrict([])


def test_unexpected_landlock_version_reply_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only ENOSYS and EOPNOTSUPP say that there is none."""

    def odd(name: str, *_: object) -> int:
        raise OSError(errno.EPERM, name)

    monkeypatch.setattr(syscall, "call", odd)
    with pytest.raises(PermissionError):
        landlock.ruleset([])


def test_missing_path_in_a_landlock_rule_is_an_error_unless_optional() -> None:
    """And one that may be absent is only left out."""

    def act() -> str:
        landlock.restrict([landlock.Rule(where="/absent", access=landlock.READ, optional=True)])
        return errno_of(lambda: os.open("/etc/passwd", os.O_RDONLY))

    with pytest.raises(FileNotFoundError):
        landlock.ruleset([landlock.Rule(where="/absent", access=landlock.READ)])
    assert in_child(act) == "EACCES"


def test_descriptor_without_a_path_is_refused_in_a_landlock_rule() -> None:
    """A pipe, which Landlock does not govern either."""
    read_end, write_end = os.pipe()
    with pytest.raises(OSError, match="landlock_add_rule") as refused:
        landlock.ruleset([landlock.Rule(where=read_end, access=landlock.READ)])
    assert refused.value.errno == errno.EBADFD
    os.close(read_end)
    os.close(write_end)


def test_failed_landlock_ruleset_leaves_no_descriptor() -> None:
    """It is closed on the way out."""
    with none_left_open(), pytest.raises(FileNotFoundError):
        landlock.ruleset([landlock.Rule(where="/absent", access=landlock.READ)])


def test_seventeenth_landlock_layer_is_an_error() -> None:
    """The kernel's limit; nothing runs with one layer too few."""

    def act() -> list[str]:
        return [errno_of(lambda: landlock.restrict([])) for _ in range(17)]

    assert in_child(act) == [*["done"] * 16, "E2BIG"]


def test_enforcing_landlock_sets_no_new_privs() -> None:
    """Without it a set-uid program would leave the sandbox."""

    def act() -> bool:
        landlock.restrict([])
        return no_new_privs()

    assert in_child(act)


def test_landlock_right_unknown_to_the_kernel_is_an_error() -> None:
    """EINVAL from the kernel, raised as it is."""
    with pytest.raises(OSError, match="landlock_create_ruleset") as refused:
        kernel_landlock.create_ruleset(fs=AccessFs(1 << 62), net=AccessNet(0), scope=Scope(0))
    assert refused.value.errno == errno.EINVAL
