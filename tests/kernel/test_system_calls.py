"""The thin wrappers: what the kernel does for them, tried on the kernel."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from children import in_child, no_new_privs, pdeathsig
from harness import waiting
from harness.mounts import Mounts

from convertd_daemon.linux import (
    capabilities,
    clock_getcpuclockid,
    close_range,
    execveat,
    fstatfs,
    fsuid,
    locks,
    mincore,
    openat2,
    peercred,
    posix_acl,
    prctl,
    renameat2,
    scm_rights,
    statx,
    sync_file_range,
    syscall,
    unshare,
)
from convertd_daemon.linux.capabilities import Capability
from convertd_daemon.linux.openat2 import Resolve


def is_open(descriptor: int) -> bool:
    """Tell whether a descriptor is open."""
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


class TestOpenat2:
    """openat2(2)."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Iterator[int]:
        """Give a directory with a file, a link to it, and links that lead out."""
        (tmp_path / "inside").mkdir()
        (tmp_path / "inside" / "file").write_text("x")
        (tmp_path / "inside" / "link").symlink_to("file")
        (tmp_path / "inside" / "out").symlink_to("/etc/passwd")
        directory = os.open(tmp_path / "inside", os.O_PATH | os.O_DIRECTORY)
        yield directory
        os.close(directory)

    def test_openat2_adds_o_cloexec(self, root: int) -> None:
        """O_CLOEXEC is always added."""
        opened = openat2.openat2(root, "file", flags=os.O_RDONLY, resolve=Resolve.BENEATH)
        assert os.read(opened, 9) == b"x"
        assert not os.get_inheritable(opened)

    @pytest.mark.parametrize(
        ("path", "resolve", "expected"),
        [
            ("link", Resolve.NO_SYMLINKS, errno.ELOOP),
            ("out", Resolve.BENEATH, errno.EXDEV),
            ("../inside/file", Resolve.BENEATH, errno.EXDEV),
            ("/etc/passwd", Resolve.BENEATH, errno.EXDEV),
            ("absent", Resolve.BENEATH, errno.ENOENT),
        ],
        ids=["a link", "a link out", "dots out", "an absolute path", "nothing"],
    )
    def test_openat2_error_has_the_errno_and_the_path(
        self, root: int, path: str, resolve: Resolve, expected: int
    ) -> None:
        """The errno is the kernel's, and the path is in the error."""
        with pytest.raises(OSError, match=path) as refused:
            openat2.openat2(root, path, flags=os.O_RDONLY, resolve=resolve)
        assert refused.value.errno == expected

    def test_openat2_refuses_another_mount(self) -> None:
        """/proc is one, below /."""
        with pytest.raises(OSError, match="proc") as refused:
            openat2.openat2(-100, "/proc/version", flags=os.O_RDONLY, resolve=Resolve.NO_XDEV)
        assert refused.value.errno == errno.EXDEV

    def test_path_with_a_nul_byte_is_refused_and_not_truncated(self, root: int) -> None:
        """The kernel would open what is before it."""
        with pytest.raises(ValueError, match="null"):
            openat2.openat2(root, "file\0x", flags=os.O_RDONLY, resolve=Resolve.BENEATH)

    def test_openat2_is_retried_after_eagain(
        self, root: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """EAGAIN is retried; the answer that follows counts."""
        answers = [errno.EAGAIN, errno.EINTR, errno.EAGAIN]
        real = syscall.call

        def busy(name: str, *arguments: int | bytes) -> int:
            if answers:
                raise OSError(answers.pop(), "busy")
            return real(name, *arguments)

        monkeypatch.setattr(syscall, "call", busy)
        assert openat2.openat2(root, "file", flags=os.O_RDONLY, resolve=Resolve.BENEATH) > 2

    def test_openat2_retries_are_limited(self, root: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """EAGAIN is the answer in the end."""

        def busy(*_: object) -> int:
            raise OSError(errno.EAGAIN, "busy")

        monkeypatch.setattr(syscall, "call", busy)
        with pytest.raises(BlockingIOError):
            openat2.openat2(root, "file", flags=os.O_RDONLY, resolve=Resolve.BENEATH)


class TestSyscallNumbers:
    """syscall(2)."""

    def test_system_call_error_names_the_call(self) -> None:
        """And has the kernel's errno."""
        with pytest.raises(OSError, match="close_range") as refused:
            syscall.call("close_range", 9, 8, 0)
        assert refused.value.errno == errno.EINVAL

    def test_unsupported_architecture_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A guess would make some other system call."""
        other = os.uname_result(("Linux", "host", "6.1", "1", "s390x"))
        monkeypatch.setattr(os, "uname", lambda: other)
        assert syscall.number("openat2") == 437  # one number on all
        with pytest.raises(OSError, match="s390x") as refused:
            syscall.number("setfsuid")
        assert refused.value.errno == errno.ENOSYS

    def test_python_of_32_bits_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernel calls the machine x86_64 then, too."""
        monkeypatch.setattr(ctypes, "sizeof", lambda _: 4)
        with pytest.raises(OSError, match="seccomp"):
            syscall.number("seccomp")


class TestPeer:
    """SO_PEERCRED and SO_PEERGROUPS."""

    @pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 3000])
    def test_peer_groups_are_complete_whatever_their_number(self, count: int) -> None:
        """Python's own getsockopt() pair at 256."""
        groups = tuple(range(10_000, 10_000 + count))

        def connect() -> tuple[peercred.Credentials, frozenset[int], int]:
            os.setgroups(groups)
            os.setresgid(1234, 1234, 1234)
            os.setresuid(1234, 1234, 1234)
            one, other = socket.socketpair()  # who made a pair is each end's peer
            with one, other:
                told = peercred.peer_credentials(one)
                return told, peercred.peer_groups(one), peercred.group_count(one)

        peer, found, number = in_child(connect)
        assert number == count
        assert (peer.uid, peer.gid, found) == (1234, 1234, frozenset(groups))
        assert peer.pid > 0

    def test_unconnected_socket_has_no_peer(self) -> None:
        """The kernel answers uid -1, which is nobody's."""
        with socket.socket(socket.AF_UNIX) as alone, pytest.raises(OSError, match="not connected"):
            peercred.peer_credentials(alone)

    def test_socket_of_another_family_has_no_peer(self) -> None:
        """TCP has no credentials."""
        with socket.socket() as alone, pytest.raises(OSError):  # noqa: PT011
            peercred.peer_credentials(alone)


class TestIdentity:
    """setfsuid(2), setfsgid(2), capabilities, prctl(2)."""

    def test_files_are_created_with_the_fsuid(self, tmp_path: Path) -> None:
        """And its right to open them counts, not root's."""
        tmp_path.chmod(0o777)
        (tmp_path / "roots").touch(0o600)

        def act() -> tuple[int, int, str, bool]:
            fsuid.setfsgid(1234)
            fsuid.setfsuid(1234)
            made = os.open("made", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=directory)
            owner = os.fstat(made)
            try:
                os.open("roots", os.O_RDONLY, dir_fd=directory)
            except PermissionError:
                refused = "refused"
            else:
                refused = "opened"
            fsuid.setfsuid(0)
            fsuid.setfsgid(0)
            back = Capability.DAC_OVERRIDE in capabilities.capget().effective
            return owner.st_uid, owner.st_gid, refused, back

        directory = os.open(tmp_path, os.O_PATH)
        assert in_child(act) == (1234, 1234, "refused", True)

    @pytest.mark.parametrize("change", [fsuid.setfsuid, fsuid.setfsgid])
    def test_failed_setfsuid_is_an_error(self, change: Callable[[int], None]) -> None:
        """The system call itself reports nothing."""

        def act() -> int | None:
            os.setresgid(1234, 1234, 1234)
            os.setresuid(1234, 1234, 1234)
            try:
                change(4321)
            except OSError as error:
                return error.errno
            return None

        assert in_child(act) == errno.EPERM

    def test_dropped_capabilities_can_not_be_regained(self) -> None:
        """capset(2) sets exactly what it is given."""

        def act() -> tuple[capabilities.Sets, int | None]:
            few = frozenset({Capability.KILL, Capability.CHOWN, 38})
            capabilities.capset(capabilities.Sets(effective=few, permitted=few))
            left = capabilities.capget()
            more = few | {Capability.SYS_ADMIN}
            try:
                capabilities.capset(capabilities.Sets(effective=more, permitted=more))
            except PermissionError as error:
                return left, error.errno
            return left, None

        few = frozenset({0, 5, 38})
        expected = capabilities.Sets(effective=few, permitted=few)
        assert in_child(act) == (expected, errno.EPERM)

    def test_prctl_settings_are_visible_in_proc(self) -> None:
        """In /proc/self/status, and to the getters."""

        def act() -> dict[str, str]:
            prctl.set_no_new_privs()
            prctl.set_name("a name that is too long")
            prctl.set_pdeathsig(signal.SIGTERM)
            prctl.set_child_subreaper()
            prctl.set_dumpable(dumpable=False)
            prctl.capbset_drop(Capability.SYS_ADMIN)
            lines = Path("/proc/self/status").read_text().splitlines()
            status = dict(line.split(":\t", 1) for line in lines)
            return status | {
                "nnp": str(no_new_privs()),
                "pdeathsig": str(pdeathsig()),
                "bound": str(prctl.capbset_read(Capability.SYS_ADMIN)),
            }

        status = in_child(act)
        assert status["Name"] == "a name that is "
        assert (status["NoNewPrivs"], status["nnp"]) == ("1", "True")
        assert (status["pdeathsig"], status["bound"]) == ("15", "False")

    def test_setfsuid_clears_the_parent_death_signal(self) -> None:
        """So it is armed after the last change of identity."""

        def act() -> int:
            prctl.set_pdeathsig(signal.SIGKILL)
            fsuid.setfsuid(1234)
            return pdeathsig()

        assert in_child(act) == 0


class TestDescriptors:
    """close_range(2), execveat(2), F_OFD_GETLK."""

    def test_close_range_closes_all_descriptors_but_those_to_keep(self) -> None:
        """Also those between them."""
        pipes = [end for _ in range(4) for end in os.pipe()]

        def act() -> list[bool]:
            others = {number for number in range(256) if is_open(number)} - set(pipes)
            close_range.close_all_but({*others, pipes[2], pipes[5]})
            return [is_open(end) for end in pipes]

        assert in_child(act) == [end in {pipes[2], pipes[5]} for end in pipes]

    def test_execveat_passes_only_the_given_environment(self) -> None:
        """No path is looked up."""
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(write_end, 1)
            program = os.open("/usr/bin/env", os.O_RDONLY | os.O_CLOEXEC)
            execveat.execveat(program, ["env"], {"A": "1", "B": "x=y"})
        os.close(write_end)
        with os.fdopen(read_end) as pipe:
            assert pipe.read() == "A=1\nB=x=y\n"
        assert os.waitpid(pid, 0)[1] == 0

    def test_execveat_argument_with_a_nul_byte_is_refused(self) -> None:
        """The program would see another one."""
        with pytest.raises(ValueError, match="null"):
            execveat.execveat(0, ["a\0b"], {})

    def test_failed_execveat_is_an_error(self, tmp_path: Path) -> None:
        """And the process goes on as it was."""
        (tmp_path / "data").write_text("x")
        with (tmp_path / "data").open() as data, pytest.raises(PermissionError):
            execveat.execveat(data.fileno(), ["data"], {})

    @pytest.mark.parametrize("kind", [fcntl.F_RDLCK, fcntl.F_WRLCK])
    def test_ofd_lock_of_another_open_file_is_detected(self, tmp_path: Path, kind: int) -> None:
        """Locks of open file descriptions, as qemu takes them, even of our own process."""
        path = tmp_path / "image"
        path.touch()
        with path.open("r+b") as theirs, path.open("rb") as ours:
            assert not locks.is_locked(ours.fileno(), 100, 203)
            flock = struct.pack("hhqqi4x", kind, os.SEEK_SET, 201, 1, 0)
            fcntl.fcntl(theirs, fcntl.F_OFD_SETLK, flock)
            assert locks.is_locked(ours.fileno(), 100, 203)
            assert not locks.is_locked(ours.fileno(), 100, 200)
            assert not locks.is_locked(theirs.fileno(), 100, 203)  # one's own is none

    def test_ofd_lock_query_on_o_path_is_an_error(self, tmp_path: Path) -> None:
        """An error, not "no"."""
        descriptor = os.open(tmp_path, os.O_PATH)
        with pytest.raises(OSError, match="Bad file descriptor"):
            locks.is_locked(descriptor, 100, 203)


class TestReceivedDescriptors:
    """SCM_RIGHTS."""

    @pytest.fixture
    def pair(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        """Both pair of a channel."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with here, there:
            yield here, there

    def test_received_descriptor_is_close_on_exec(
        self, pair: tuple[socket.socket, socket.socket], tmp_path: Path
    ) -> None:
        """Whatever it was where it came from."""
        here, there = pair
        with (tmp_path / "sent").open("wb") as sent:
            os.set_inheritable(sent.fileno(), True)
            scm_rights.send(here, b"text", [sent.fileno()])
            data, (came,) = scm_rights.receive(there, 4, 1)
            assert data == b"text"
            assert os.path.sameopenfile(came, sent.fileno())
            assert not os.get_inheritable(came)
            scm_rights.close_all([came])
        assert not is_open(came)

    @pytest.mark.parametrize(("most_bytes", "most_descriptors"), [(3, 4), (4, 2)])
    def test_oversized_message_leaves_no_descriptor_open(
        self,
        pair: tuple[socket.socket, socket.socket],
        most_bytes: int,
        most_descriptors: int,
    ) -> None:
        """It is no message then."""
        here, there = pair
        scm_rights.send(here, b"text", [0, 0, 0])
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="Message too long"):
            scm_rights.receive(there, most_bytes, most_descriptors)
        assert set(os.listdir("/proc/self/fd")) == before


class TestProcesses:
    """unshare(2) as a question, and another process's processor time."""

    def test_second_thread_is_detected(self) -> None:
        """Also by a process whose threads Python did not start."""

        def act() -> tuple[bool, bool]:
            alone = unshare.is_single_threaded()
            end = threading.Event()
            threading.Thread(target=end.wait, daemon=True).start()
            return alone, unshare.is_single_threaded()

        assert in_child(act) == (True, False)

    def test_processor_time_of_another_process_is_read(self) -> None:
        """It grows while the other computes, and needs no /proc."""
        pid = os.fork()
        if pid == 0:
            os.setresuid(1234, 1234, 1234)
            while True:
                pass
        try:
            deadline = time.monotonic() + 30
            while clock_getcpuclockid.cpu_time_s(pid) < 0.02:
                assert time.monotonic() < deadline
        finally:
            os.kill(pid, signal.SIGKILL)
            used = os.wait4(pid, 0)[2]
        assert used.ru_utime + used.ru_stime > 0.01
        with pytest.raises(OSError, match="Invalid"):
            clock_getcpuclockid.cpu_time_s(pid)

    def test_process_limits_are_unchanged_after_the_tests(self) -> None:
        """What can't be undone happens in children."""
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 1000
        assert not no_new_privs()


class TestFstatfs:
    """fstatfs(2)."""

    @pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
    def test_fstatfs_reports_the_file_system_type(self, mounts: Mounts, kind: str) -> None:
        """Of a descriptor of O_PATH too."""
        memory, name = kind == "tmpfs", f"magic-of-{kind}"
        point = mounts.in_memory(kind, name) if memory else mounts.on_a_loop(kind, name)
        directory = os.open(point, os.O_PATH)
        assert fstatfs.magic(directory) == fstatfs.Magic[kind.upper()]
        os.close(directory)

    def test_closed_descriptor_is_an_error(self) -> None:
        """The kernel's own."""
        with pytest.raises(OSError, match="fstatfs: Bad file descriptor"):
            fstatfs.magic(9999)


class TestStatx:
    """statx(2)."""

    def test_statx_reports_the_alignment_for_direct_io(self, mounts: Mounts) -> None:
        """XFS does: whole sectors of its disk."""
        file = os.open(mounts.on_a_loop("xfs", "alignment") / "file", os.O_CREAT | os.O_RDWR)
        told = statx.direct_alignment(file)
        os.close(file)
        assert told is not None
        assert told.offset in {512, 4096}
        assert 0 < told.memory <= told.offset

    def test_statx_reports_no_alignment_on_other_file_systems(self, mounts: Mounts) -> None:
        """Ramfs has nothing to say."""
        file = os.open(mounts.in_memory("ramfs", "ramfs") / "file", os.O_CREAT | os.O_RDWR)
        assert statx.direct_alignment(file) is None
        os.close(file)

    def test_closed_descriptor_is_an_error(self) -> None:
        """The kernel's own."""
        with pytest.raises(OSError, match="statx: Bad file descriptor"):
            statx.direct_alignment(9999)

    @pytest.mark.parametrize(
        ("letter", "expected"),
        [
            ("", statx.Attribute(0)),
            ("a", statx.Attribute.APPEND),
            ("i", statx.Attribute.IMMUTABLE),
            ("ai", statx.Attribute.APPEND | statx.Attribute.IMMUTABLE),
            ("A", statx.Attribute(0)),
        ],
    )
    def test_statx_reports_chattr_attributes(
        self, tmp_path: Path, letter: str, expected: statx.Attribute
    ) -> None:
        """Of a file and of a directory, also where they are open as a mere path."""
        for path in (tmp_path / "file", tmp_path / "directory"):
            path.touch() if path.name == "file" else path.mkdir()
            fd = os.open(path, os.O_PATH)
            subprocess.run(["chattr", f"+{letter}", str(path)], check=bool(letter))
            assert statx.attributes(fd) == expected
            subprocess.run(["chattr", "-ai", str(path)], check=True)
            os.close(fd)

    def test_statx_reports_the_birth_time_of_a_directory(self, mounts: Mounts) -> None:
        """XFS does, and a rename changes nothing of it. Ramfs does not."""
        now_ns = time.time_ns()
        made = mounts.on_a_loop("xfs", "births") / "made"
        made.mkdir()
        born_ns = _born_ns(made)
        assert abs(born_ns - now_ns) < 60 * 10**9
        assert _born_ns(made.rename(made.with_name("renamed"))) == born_ns
        assert _born_ns(mounts.in_memory("ramfs", "without-births")) == 0


def _born_ns(path: Path) -> int:
    fd = os.open(path, os.O_PATH)
    try:
        return statx.birth_ns(fd)
    finally:
        os.close(fd)


class TestRenameat2:
    """renameat2(2)."""

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Iterator[int]:
        """A directory with two files, `one` and `two`."""
        for name in ("one", "two"):
            (tmp_path / name).write_text(name)
        fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        yield fd
        os.close(fd)

    def test_renameat2_exchanges_two_names(self, tmp_path: Path, directory: int) -> None:
        """Each has the other's file."""
        renameat2.renameat2(directory, "one", "two", renameat2.Flag.EXCHANGE)
        assert (tmp_path / "one").read_text() == "two"
        assert (tmp_path / "two").read_text() == "one"

    def test_renameat2_noreplace_replaces_nothing(self, tmp_path: Path, directory: int) -> None:
        """A name that exists is an error, one that does not is taken."""
        with pytest.raises(FileExistsError):
            renameat2.renameat2(directory, "one", "two", renameat2.Flag.NOREPLACE)
        renameat2.renameat2(directory, "one", "three", renameat2.Flag.NOREPLACE)
        assert sorted(os.listdir(tmp_path)) == ["three", "two"]

    def test_renameat2_exchange_needs_both_names(self, directory: int) -> None:
        """Else nothing is done."""
        with pytest.raises(FileNotFoundError):
            renameat2.renameat2(directory, "one", "three", renameat2.Flag.EXCHANGE)

    def test_renameat2_refuses_a_name_with_a_nul_byte(self, directory: int) -> None:
        """At its NUL byte."""
        with pytest.raises(ValueError, match="null byte"):
            renameat2.renameat2(directory, "one\0x", "three", renameat2.Flag.NOREPLACE)


class TestPosixAcl:
    """acl(5)."""

    def writers(self, path: Path) -> posix_acl.Writers | None:
        """Whom a directory's list lets write."""
        fd = os.open(path, os.O_PATH)
        try:
            return posix_acl.writers(fd)
        finally:
            os.close(fd)

    def test_directory_without_an_acl_has_none(self, tmp_path: Path) -> None:
        """Nor has a file system without lists."""
        assert self.writers(tmp_path) is None
        assert self.writers(Path("/proc")) is None

    def test_acl_reports_users_who_may_write(self, tmp_path: Path) -> None:
        """And nobody who may only read."""
        entries = "u:1234:rwx,u:5:rx,g:1300:w,g:6:x,g::rx"
        subprocess.run(["setfacl", "-m", entries, str(tmp_path)], check=True)
        assert self.writers(tmp_path) == posix_acl.Writers(
            uids=frozenset({1234}), gids=frozenset({1300}), owning_group=False
        )
        subprocess.run(["setfacl", "-m", "g::rwx", str(tmp_path)], check=True)
        told = self.writers(tmp_path)
        assert told is not None
        assert told.owning_group


class TestSyncFileRange:
    """sync_file_range(2)."""

    @pytest.fixture
    def dirty(self) -> Iterator[int]:
        """A file of 8 MiB on a disk, none of which is on it yet."""
        with tempfile.TemporaryFile(dir="/var/lib") as file:
            os.posix_fallocate(file.fileno(), 0, 8 << 20)
            os.fsync(file.fileno())
            os.pwrite(file.fileno(), bytes(8 << 20), 0)
            yield file.fileno()

    def test_written_pages_are_clean_and_can_be_dropped(self, dirty: int) -> None:
        """A dirty page can't."""
        sync_file_range.write_and_wait(dirty)
        os.posix_fadvise(dirty, 0, 0, os.POSIX_FADV_DONTNEED)
        assert mincore.resident_pages(dirty, 0, 8 << 20) == 0

    def test_pages_become_clean_without_being_waited_for(self, dirty: int) -> None:
        """Some time later."""
        sync_file_range.begin_write(dirty)

        def dropped() -> bool:
            os.posix_fadvise(dirty, 0, 0, os.POSIX_FADV_DONTNEED)
            return mincore.resident_pages(dirty, 0, 8 << 20) == 0

        waiting.until(dropped, "they are on the disk")

    @pytest.mark.parametrize("call", [sync_file_range.begin_write, sync_file_range.write_and_wait])
    def test_error_has_the_kernels_errno(self, call: Callable[[int], None]) -> None:
        """A pipe has no pages."""
        read_end, write_end = os.pipe()
        try:
            with pytest.raises(OSError, match="sync_file_range") as caught:
                call(write_end)
            assert caught.value.errno == errno.ESPIPE
        finally:
            os.close(read_end)
            os.close(write_end)
