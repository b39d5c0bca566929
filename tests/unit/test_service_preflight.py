"""What must be there before the daemon serves: each thing that is missing gives one clear line."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import resource
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import grants
import pytest
from children import in_child

from convertd_daemon.linux import landlock
from convertd_daemon.sandbox.identity import Identity
from convertd_daemon.service import preflight
from convertd_daemon.service.preflight import StartError

FRONT = Identity(uid=1500, gid=1501)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory of root's."""
    with tempfile.TemporaryDirectory(dir="/run") as made:
        yield Path(made)


def complaint_of(act: Callable[[], object]) -> str:
    """The line with which the daemon does not start."""
    with pytest.raises(StartError) as refused:
        act()
    assert "\n" not in str(refused.value)
    return str(refused.value)


class TestSystemUsers:
    """The two that the daemon's processes run as."""

    def test_existing_system_user_is_found(self) -> None:
        """With its own group, and no others."""
        entry = pwd.getpwnam("nobody")
        assert preflight.user("nobody") == Identity(uid=entry.pw_uid, gid=entry.pw_gid)

    def test_missing_system_user_can_be_created_with_the_printed_command(self) -> None:
        """It has the command."""
        complaint = complaint_of(lambda: preflight.user("convertd-nobody"))
        assert "there is no user convertd-nobody" in complaint
        assert complaint.endswith("/usr/sbin/nologin convertd-nobody")

    def test_system_user_with_uid_0_is_rejected(self) -> None:
        """An entry of uid 0 would run qemu-img as root."""
        assert "must not be root" in complaint_of(lambda: preflight.user("root"))


class TestKernelRequirements:
    """What it must have, and must have on."""

    def test_running_kernel_passes_the_preflight(self) -> None:
        """And its Landlock is told."""
        assert preflight.check_kernel() == landlock.abi()

    def test_preflight_refuses_a_daemon_without_root(self) -> None:
        """Before anything else goes wrong."""

        def act() -> str:
            os.setresuid(1234, 1234, 1234)
            return complaint_of(preflight.check_kernel)

        assert "must be started as root" in in_child(act)

    def test_preflight_requires_protected_hardlinks(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With the command that makes it so."""
        setting = directory / "protected_hardlinks"
        setting.write_text("0\n")
        monkeypatch.setattr(preflight, "PROTECTED_HARDLINKS", str(setting))
        assert "sysctl -w fs.protected_hardlinks=1" in complaint_of(preflight.check_kernel)

    def test_preflight_requires_landlock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not with less protection either."""
        monkeypatch.setattr(landlock, "abi", lambda: 0)
        assert "no Landlock" in complaint_of(preflight.check_kernel)


class TestQemuImgProgram:
    """qemu-img."""

    def test_qemu_img_of_debian_passes_the_preflight(self) -> None:
        """Root's, and writable by nobody else."""
        preflight.check_program("/usr/bin/qemu-img")

    def test_missing_qemu_img_is_named_with_its_package_by_the_preflight(self) -> None:
        """And why it can't be had."""
        complaint = complaint_of(lambda: preflight.check_program("/usr/bin/no-qemu-img"))
        assert complaint == "/usr/bin/no-qemu-img: No such file or directory (package qemu-utils)"

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda path: path.chmod(0o775), id="its-group-may-write"),
            pytest.param(lambda path: path.chmod(0o757), id="anybody-may-write"),
            pytest.param(lambda path: os.chown(path, 1234, 0), id="it-is-anothers"),
            pytest.param(lambda path: (path.unlink(), path.mkdir()), id="it-is-a-directory"),
        ],
    )
    def test_qemu_img_is_refused_by_the_preflight_if(
        self, directory: Path, change: Callable[[Path], object]
    ) -> None:
        """It would be started with what the daemon may."""
        program = directory / "qemu-img"
        program.touch(0o755)
        preflight.check_program(str(program))
        change(program)
        assert "only root can write" in complaint_of(lambda: preflight.check_program(str(program)))

    @pytest.mark.parametrize(
        ("change", "by_whom"),
        [
            pytest.param(lambda path: path.chmod(0o775), "members of gid 0", id="its-group-may"),
            pytest.param(lambda path: path.chmod(0o757), "everybody", id="anybody-may"),
            pytest.param(lambda path: os.chown(path, 1234, 0), "uid 1234", id="it-is-anothers"),
        ],
    )
    @pytest.mark.parametrize("way", ["qemu-img", "there", "back", "away"])
    def test_one_in_a_directory_that_others_can_write_is_refused(
        self, directory: Path, way: str, change: Callable[[Path], object], by_whom: str
    ) -> None:
        """They would put another in its place; so would who can write where a link to it lies."""
        theirs = directory / "theirs"
        (theirs / "below").mkdir(parents=True)
        theirs.chmod(0o755)
        directory.chmod(0o755)
        for program in (directory / "qemu-img", theirs / "qemu-img"):
            program.touch(0o755)
        (directory / "there").symlink_to("theirs/qemu-img")
        (directory / "back").symlink_to(theirs / "below" / ".." / ".." / "qemu-img")
        (theirs / "away").symlink_to("../qemu-img")
        named = str({"there": directory, "back": directory}.get(way, theirs) / way)
        preflight.check_program(named)
        change(theirs)
        reason = f"{theirs} can be changed by {by_whom}, who could so replace it"
        assert complaint_of(lambda: preflight.check_program(named)) == f"{named}: {reason}"

    def test_endless_symlinks_are_reported(self, directory: Path) -> None:
        """As the kernel does."""
        (directory / "qemu-img").symlink_to("qemu-img")
        complaint = complaint_of(lambda: preflight.check_program(str(directory / "qemu-img")))
        assert "Too many levels of symbolic links" in complaint


@contextlib.contextmanager
def _exchanging(directory: Path, one: bytes, other: bytes) -> Iterator[None]:
    """Have the two names exchanged all the time by another process, which may do that."""
    libc = ctypes.CDLL(None)
    fd = os.open(directory, os.O_PATH)
    with warnings.catch_warnings():
        # pytest's watchdog is a second thread; the child has only the one that forked.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os.setresuid(FRONT.uid, FRONT.uid, FRONT.uid)
        while True:
            libc.renameat2(fd, one, fd, other, 2)  # RENAME_EXCHANGE
    os.close(fd)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


class TestPrivateDirectory:
    """Where gRPC listens, and only the front gets in."""

    def test_private_directory_is_accessible_to_the_front_only(self, directory: Path) -> None:
        """Beside the public socket."""
        path = preflight.private_directory(str(directory / "sock"), FRONT)
        assert path == str(directory / "sock.private")
        status = os.stat(path)
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (1500, 1501, 0o700)

    @pytest.mark.parametrize("owner", [0, FRONT.uid])
    def test_private_directory_of_the_last_daemon_is_cleared(
        self, directory: Path, owner: int
    ) -> None:
        """Also if its mode was changed."""
        left = directory / "sock.private"
        left.mkdir(0o777)
        (left / "grpc.sock").touch()
        os.chown(left, owner, owner)
        preflight.private_directory(str(directory / "sock"), FRONT)
        assert os.listdir(left) == []
        assert left.stat().st_mode & 0o7777 == 0o700

    def test_private_directory_of_another_user_is_left_unchanged(self, directory: Path) -> None:
        """The daemon does not start instead."""
        theirs = directory / "sock.private"
        theirs.mkdir()
        (theirs / "file").touch()
        os.chown(theirs, 1234, 1234)
        complaint = complaint_of(
            lambda: preflight.private_directory(str(directory / "sock"), FRONT)
        )
        assert complaint == f"{theirs}: belongs to another user"
        assert (theirs / "file").exists()

    def test_private_directory_that_is_a_symlink_is_not_followed(self, directory: Path) -> None:
        """What it leads to stays as it is."""
        elsewhere = directory / "elsewhere"
        elsewhere.mkdir(0o755)
        (directory / "sock.private").symlink_to(elsewhere)
        with pytest.raises(OSError, match=r"sock\.private"):
            preflight.private_directory(str(directory / "sock"), FRONT)
        assert elsewhere.stat().st_mode & 0o7777 == 0o755

    def test_private_directory_swapped_for_a_symlink_is_not_followed(self, directory: Path) -> None:
        """By a front of before that still lives and has been taken over: the directory is its."""
        victim = directory / "victim"
        victim.mkdir(0o755)
        (victim / "file").touch()
        left = directory / "sock.private"
        for _ in range(200):
            left.mkdir(0o700, exist_ok=True)
            (left / "inner").mkdir()
            (left / "link").symlink_to(victim)
            os.chown(left, FRONT.uid, FRONT.gid)
            with _exchanging(left, b"inner", b"link"), contextlib.suppress(OSError):
                preflight.private_directory(str(directory / "sock"), FRONT)
            assert (victim / "file").exists()
            preflight.remove_directory(str(left))

    def test_private_directory_that_can_not_be_created_is_reported(self, directory: Path) -> None:
        """In one line."""
        complaint = complaint_of(
            lambda: preflight.private_directory(str(directory / "missing" / "sock"), FRONT)
        )
        assert complaint.startswith("can't make ")

    def test_private_directory_is_removed_when_the_daemon_stops(self, directory: Path) -> None:
        """With what is in it; and if it is gone already, all the better."""
        path = preflight.private_directory(str(directory / "sock"), FRONT)
        Path(path, "grpc.sock").touch()
        preflight.remove_directory(path)
        assert not os.path.exists(path)
        preflight.remove_directory(path)


class TestAliasDirectory:
    """Where jobs make links, for formats that keep a file's name."""

    def test_alias_directory_can_be_traversed_and_not_listed(self, directory: Path) -> None:
        """By qemu-img, which is another user."""
        path = preflight.names_directory(str(directory / "sock"))
        status = os.stat(path)
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (0, 0, 0o711)

    def test_aliases_of_killed_jobs_are_removed(self, directory: Path) -> None:
        """Each lies in a directory of its own; what they lead to stays."""
        left = directory / "sock.names" / "1a2b"
        left.mkdir(parents=True)
        (left / "disk.vmdk").symlink_to("/etc/passwd")
        path = preflight.names_directory(str(directory / "sock"))
        assert os.listdir(path) == []
        assert os.path.exists("/etc/passwd")


class TestDescriptors:
    """The policy's connections need some each."""

    def test_connection_limit_within_the_descriptor_limit_is_accepted(self) -> None:
        """Into whatever this machine has."""
        preflight.check_descriptors(grants.limits(connections=1))

    def test_connection_limit_over_the_hard_descriptor_limit_is_refused(self) -> None:
        """With both numbers, and both ways out."""

        def act() -> str:
            resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
            limits = grants.limits(connections=1024)
            return complaint_of(lambda: preflight.check_descriptors(limits))

        complaint = in_child(act)
        assert complaint.startswith("1024 connections take ")
        assert "the hard limit is 512" in complaint

    def test_unlimited_descriptors_are_enough_for_any_connection_limit(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Infinity is -1 to Python, and not compared as a number."""
        endless = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        monkeypatch.setattr(resource, "getrlimit", lambda _: endless)
        preflight.check_descriptors(grants.limits(connections=65536))
