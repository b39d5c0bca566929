"""What a compromised qemu-img can do: a Python in its place tries."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from children import in_child

from convertd_daemon.linux import capabilities
from convertd_daemon.sandbox import confine_broker, spawn

if TYPE_CHECKING:
    from compromised import CompromisedProgram


# The scripts below make system calls by number.
pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason=f"needs x86_64, this is {platform.machine()}"
)

ALL_ABIS = pytest.mark.parametrize("abi", [1, 2, 3, 4, 5, 6, None])
RIGHTS = pytest.mark.parametrize("read_search", [False, True], ids=["no cap", "read_search"])


@pytest.fixture
def public() -> Iterator[Path]:
    """Give a directory in which everybody may do everything, as far as its mode goes."""
    directory = Path("/var/tmp") / f"convertd-compromised-{os.getpid()}"  # noqa: S108
    directory.mkdir(mode=0o777)
    directory.chmod(0o777)
    file = directory / "file"
    file.write_text("x")
    file.chmod(0o666)
    os.chown(file, 1500, 1500)  # even what belongs to the worker's own uid
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(directory / "socket"))
        (directory / "socket").chmod(0o777)
        server.listen()
        yield directory
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


@ALL_ABIS
@RIGHTS
def test_compromised_qemu_img_can_open_no_file(
    compromised: CompromisedProgram, public: Path, abi: int | None, *, read_search: bool
) -> None:
    """Neither by name, nor by number, nor its metadata; even one that the uid owns."""
    script = f"""
file, link = {str(public / "file")!r}, {str(public / "new")!r}
directory = {str(public)!r}
handle = ctypes.create_string_buffer(b"\\x80" + bytes(7) + bytes(128))
attempt("read", lambda: os.open(file, os.O_RDONLY))
attempt("write", lambda: os.open(file, os.O_WRONLY))
attempt("read /etc/passwd", lambda: os.open("/etc/passwd", os.O_RDONLY))
attempt("read /proc", lambda: os.open("/proc/self/status", os.O_RDONLY))
attempt("list", lambda: os.listdir(directory))
attempt("create", lambda: os.open(link, os.O_CREAT | os.O_WRONLY))
attempt("unnamed", lambda: os.open(directory, os.O_TMPFILE | os.O_WRONLY))
attempt("mkdir", lambda: os.mkdir(link))
attempt("symlink", lambda: os.symlink(file, link))
attempt("link", lambda: os.link(file, link))
attempt("rename", lambda: os.rename(file, link))
attempt("unlink", lambda: os.unlink(file))
attempt("mkfifo", lambda: os.mkfifo(link))
attempt("truncate", lambda: os.truncate(file, 0))
attempt("chmod", lambda: os.chmod(file, 0o777))
attempt("chown", lambda: os.chown(file, 1500, 1500))
attempt("utime", lambda: os.utime(file))
attempt("setxattr", lambda: os.setxattr(file, "user.a", b"x"))
attempt("removexattr", lambda: os.removexattr(file, "user.a"))
attempt("by handle", lambda: call(304, -100, handle, os.O_RDONLY))
attempt("to handle", lambda: call(303, -100, file.encode(), handle, handle, 0))
attempt("inotify", lambda: call(294, 0))
attempt("chroot", lambda: os.chroot(directory))
attempt("memfd", lambda: os.memfd_create("m"))
"""
    opening = {
        "read", "write", "read /etc/passwd", "read /proc", "list", "create", "unnamed",
    }  # fmt: skip
    outcomes = compromised.but(keep_read_search=read_search, abi=abi).tries(script)
    assert len(outcomes) == 24
    assert outcomes == {name: "EACCES" if name in opening else "EPERM" for name in outcomes}
    assert (public / "file").read_text() == "x"
    assert sorted(os.listdir(public)) == ["file", "socket"]


@ALL_ABIS
@RIGHTS
def test_compromised_qemu_img_can_read_no_metadata_but_stat(
    compromised: CompromisedProgram, public: Path, abi: int | None, *, read_search: bool
) -> None:
    """Of no file by name, descriptor or handle, with CAP_DAC_READ_SEARCH either."""
    secret = public / "secret"
    secret.write_text("x")
    secret.chmod(0)
    os.setxattr(secret, "user.secret", b"x")
    link = public / "link"
    link.symlink_to("/secret/place")
    script = f"""
file, link, out = {str(secret)!r}.encode(), {str(link)!r}.encode(), ctypes.create_string_buffer(256)
path = os.open(file, os.O_PATH)
to = os.open(link, os.O_PATH | os.O_NOFOLLOW)
args = (ctypes.c_uint64 * 2)(ctypes.addressof(out), 256)
attempt("getxattr", lambda: os.getxattr(file, "user.secret"))
attempt("lgetxattr", lambda: os.getxattr(file, "user.secret", follow_symlinks=False))
attempt("fgetxattr", lambda: call(193, path, b"user.secret", out, 256))
attempt("getxattrat", lambda: call(464, -100, file, 0, b"user.secret", args, 16))
attempt("getxattrat, descriptor", lambda: call(464, path, b"", 0x1000, b"user.secret", args, 16))
attempt("listxattr", lambda: os.listxattr(file))
attempt("llistxattr", lambda: os.listxattr(file, follow_symlinks=False))
attempt("flistxattr", lambda: call(196, path, out, 256))
attempt("listxattrat", lambda: call(465, -100, file, 0, out, 256))
attempt("file_getattr", lambda: call(468, -100, file, out, 24, 0))
attempt("file_setattr", lambda: call(469, -100, file, out, 24, 0))
attempt("readlink", lambda: os.readlink(link))
attempt("readlinkat", lambda: call(267, to, b"", out, 256))
attempt("where we are", lambda: os.readlink("/proc/self/cwd"))
attempt("statfs", lambda: os.statvfs(b"/"))
attempt("ustat", lambda: call(136, os.makedev(0, 1), out))
"""
    outcomes = compromised.but(keep_read_search=read_search, abi=abi).tries(script)
    assert outcomes == dict.fromkeys(outcomes, "EPERM")
    assert len(outcomes) == 16


@ALL_ABIS
def test_compromised_qemu_img_can_flush_only_its_own_descriptors(
    compromised: CompromisedProgram, public: Path, abi: int | None
) -> None:
    """Whoever writes a lot would wait with it; its own descriptors are its own to flush."""
    descriptor = os.open(public / "file", os.O_RDWR)
    script = f"""
import fcntl
attempt("sync", lambda: call(162))
attempt("syncfs", lambda: call(306, {descriptor}))
attempt("btrfs sync", lambda: fcntl.ioctl({descriptor}, 0x9408))
attempt("btrfs start sync", lambda: fcntl.ioctl({descriptor}, 0x80089418, bytes(8)))
attempt("own", lambda: os.fsync({descriptor}))
attempt("own data", lambda: os.fdatasync({descriptor}))
"""
    changed = compromised.but(abi=abi, write=(descriptor,))
    outcomes = changed.tries(script, inherit=(descriptor,))
    os.close(descriptor)
    assert outcomes == {
        **dict.fromkeys(["sync", "syncfs", "btrfs sync", "btrfs start sync"], "EPERM"),
        **dict.fromkeys(["own", "own data"], "done"),
    }


def test_compromised_qemu_img_can_make_no_system_call_that_is_not_listed(
    compromised: CompromisedProgram,
) -> None:
    """Whichever it is: those that nobody needs are not there to be thought of one by one."""
    script = """
attempt("landlock", lambda: call(444, None, 0, 1))
attempt("lsm_set_self_attr", lambda: call(460, 100, None, 0, 0))
attempt("robust list of another", lambda: call(274, 1, None, None))
attempt("vmsplice", lambda: call(278, 1, None, 0, 0))
attempt("splice", lambda: call(275, 1, None, 1, None, 0, 0))
attempt("new session", lambda: call(112))
attempt("working directory", lambda: os.chdir("/"))
attempt("uselib", lambda: call(134, b"/etc/passwd"))
attempt("younger than all", lambda: call(4000))
"""
    outcomes = compromised.tries(script)
    assert outcomes == dict.fromkeys(outcomes, "ENOSYS")
    assert len(outcomes) == 9


@ALL_ABIS
def test_compromised_qemu_img_can_not_access_memory_of_another_job(
    compromised: CompromisedProgram, abi: int | None
) -> None:
    """A qemu-img that runs for somebody else, of the same uid and in a sandbox of its own."""

    def act() -> dict[str, str]:
        wait, go = os.pipe()
        one = compromised.start(
            f"import os; print(1, flush=True); os.read({wait}, 1)", inherit=(wait,)
        )
        with one as victim:
            os.set_blocking(victim.stdout, True)
            assert os.read(victim.stdout, 9) == b"1\n"
            script = f"""
victim, out = {victim.pid}, ctypes.create_string_buffer(256)
def read(name):
    with open(f"/proc/{{victim}}/{{name}}", "rb") as file:
        file.read(1)

for name in ("mem", "maps", "environ", "fd/0", "cmdline", "auxv", "stat"):
    attempt(name, lambda: read(name))
attempt("ptrace", lambda: call(101, 16, victim, 0, 0))
attempt("read", lambda: call(310, victim, None, 0, None, 0, 0))
attempt("descriptor", lambda: call(438, 3, 1, 0))
attempt("link", lambda: os.readlink(f"/proc/{{victim}}/exe"))
"""
            outcomes = compromised.but(abi=abi).tries(script)
            os.write(go, b"x")
            assert victim.wait() == 0
        return outcomes

    outcomes = in_child(act)
    by_seccomp = ("ptrace", "read", "descriptor", "link")
    assert outcomes == {name: "EPERM" if name in by_seccomp else "EACCES" for name in outcomes}
    assert len(outcomes) == 11


@ALL_ABIS
def test_compromised_qemu_img_can_not_access_other_processes(
    compromised: CompromisedProgram, abi: int | None
) -> None:
    """Not even one of the same uid, which another job's qemu-img is."""
    victim = os.fork()
    if victim == 0:
        os.setresuid(1500, 1500, 1500)
        signal.pause()
    script = f"""
victim, limit = {victim}, (ctypes.c_uint64 * 2)(0, 0)
attempt("kill", lambda: os.kill(victim, 0))
attempt("kill all", lambda: os.kill(-1, 0))
attempt("tkill", lambda: call(200, victim, 0))
attempt("tgkill", lambda: call(234, victim, victim, 0))
attempt("sigqueue", lambda: call(129, victim, 9, limit))
attempt("pidfd", lambda: os.pidfd_open(victim))
attempt("ptrace", lambda: call(101, 16, victim, 0, 0))
attempt("traceme", lambda: call(101, 0, 0, 0, 0))
attempt("read memory", lambda: call(310, victim, None, 0, None, 0, 0))
attempt("write memory", lambda: call(311, victim, None, 0, None, 0, 0))
attempt("prlimit", lambda: call(302, victim, 0, limit, None))
attempt("prlimit, high bits", lambda: call(302, victim | 1 << 40, 0, limit, None))
attempt("priority", lambda: os.setpriority(os.PRIO_PROCESS, victim, 19))
attempt("own priority", lambda: os.setpriority(os.PRIO_PROCESS, 0, 19))
attempt("affinity", lambda: os.sched_setaffinity(victim, [0]))
attempt("scheduler", lambda: os.sched_setscheduler(victim, os.SCHED_BATCH, os.sched_param(0)))
attempt("ioprio", lambda: call(251, 1, victim, 3 << 13))
attempt("shared memory", lambda: call(29, 0, 4096, 0o1666))
attempt("disarm", lambda: call(157, 1, 0, 0, 0, 0))
attempt("owner of a pipe", lambda: call(72, 1, 8, victim))
attempt("owner of a pipe, extended", lambda: call(72, 1, 15, limit))
attempt("signal of a pipe", lambda: call(72, 1, 10, 9))
attempt("owner by ioctl", lambda: call(16, 1, 0x8901, limit))
"""
    try:
        outcomes = compromised.but(abi=abi).tries(script)
    finally:
        os.kill(victim, signal.SIGKILL)
        _, status = os.waitpid(victim, 0)
    assert outcomes == dict.fromkeys(outcomes, "EPERM")
    assert len(outcomes) == 23
    assert status == signal.SIGKILL


@ALL_ABIS
def test_compromised_qemu_img_can_not_use_sockets(
    compromised: CompromisedProgram, public: Path, abi: int | None
) -> None:
    """None can be made; Landlock does not govern one that has a path."""
    script = f"""
def connect(family, address):
    with socket.socket(family) as client:
        client.connect(address)

attempt("path", lambda: connect(socket.AF_UNIX, {str(public / "socket")!r}))
attempt("abstract", lambda: connect(socket.AF_UNIX, "\\0name"))
attempt("tcp", lambda: connect(socket.AF_INET, ("127.0.0.1", 22)))
attempt("netlink", lambda: socket.socket(socket.AF_NETLINK))
attempt("pair", lambda: socket.socketpair())
"""
    outcomes = compromised.but(abi=abi).tries(script)
    assert outcomes == dict.fromkeys(["path", "abstract", "tcp", "netlink", "pair"], "EPERM")


@ALL_ABIS
def test_compromised_qemu_img_can_not_execute_another_program(
    compromised: CompromisedProgram, abi: int | None
) -> None:
    """Whatever the way; descriptor 700 is gone and can't come back."""
    script = """
argv = (ctypes.c_char_p * 2)(b"sh", None)
def execveat(descriptor, path, flags):
    call(322, descriptor, path, argv, None, flags)

attempt("execve", lambda: os.execv("/bin/sh", ["sh"]))
attempt("execve itself", lambda: os.execv(sys.executable, ["python3"]))
attempt("execveat, no descriptor", lambda: execveat(-100, b"/bin/sh", 0))
attempt("execveat, another descriptor", lambda: execveat(0, b"", 0x1000))
attempt("execveat, high bits", lambda: execveat(700 | 1 << 40, b"", 0x1000))
attempt("execveat, without the flag", lambda: execveat(700, b"/bin/sh", 0))
attempt("execveat, 700", lambda: execveat(700, b"", 0x1000))
attempt("execveat, 700 and a path", lambda: execveat(700, b"/bin/sh", 0x1000))
attempt("dup2", lambda: os.dup2(0, 700))
attempt("limit", lambda: call(302, 0, 7, (ctypes.c_uint64 * 2)(1024, 1024), None))
attempt("fork", os.fork)
attempt("vfork", lambda: call(58))
attempt("clone", lambda: call(56, signal.SIGCHLD, 0, 0, 0, 0))
attempt("clone3", lambda: call(435, None, 0))
attempt("user namespace", lambda: call(272, 0x10000000))
attempt("io_uring", lambda: call(425, 8, None))
attempt("thread", lambda: threading.Thread(target=id, args=(1,)).start())
"""
    assert compromised.but(abi=abi).tries(script) == {
        "execve": "EPERM",
        "execve itself": "EPERM",
        "execveat, no descriptor": "EPERM",
        "execveat, another descriptor": "EPERM",
        "execveat, high bits": "EPERM",
        "execveat, without the flag": "EPERM",
        "execveat, 700": "EBADF",
        "execveat, 700 and a path": "EACCES",
        "dup2": "EBADF",
        "limit": "EPERM",
        "fork": "EPERM",
        "vfork": "EPERM",
        "clone": "EPERM",
        "clone3": "ENOSYS",
        "user namespace": "EPERM",
        "io_uring": "ENOSYS",
        "thread": "done",
    }


@pytest.mark.parametrize(("abi", "expected"), [(4, "ENOTTY"), (5, "EACCES"), (None, "EACCES")])
def test_compromised_qemu_img_can_make_no_ioctl_on_other_devices(
    compromised: CompromisedProgram, abi: int | None, expected: str
) -> None:
    """By Landlock from ABI 5; those that reach furthest by seccomp, always."""
    script = """
import fcntl
null = os.open("/dev/null", os.O_RDWR)
attempt("size", lambda: fcntl.ioctl(null, 0x80081272, bytes(8)))
attempt("push input", lambda: fcntl.ioctl(null, 0x5412, b"x"))
attempt("scsi", lambda: fcntl.ioctl(null, 0x2285, bytes(88)))
attempt("nvme", lambda: fcntl.ioctl(null, 0xC0484E41, bytes(72)))
attempt("loop", lambda: fcntl.ioctl(null, 0x4C04, bytes(232)))
attempt("reserve", lambda: fcntl.ioctl(null, 0x401070C9, bytes(16)))
attempt("lease", lambda: fcntl.fcntl(null, 1024, 0))
attempt("a disk", lambda: os.open("/dev/loop0", os.O_RDONLY))
"""
    assert compromised.but(abi=abi, keep_read_search=True).tries(script) == {
        "size": expected,
        "push input": "EPERM",
        **dict.fromkeys(["scsi", "nvme", "loop", "reserve", "lease"], "EPERM"),
        "a disk": "EACCES",
    }


def test_compromised_qemu_img_inherits_no_environment_descriptor_or_handler(
    compromised: CompromisedProgram,
) -> None:
    """Neither environment, nor descriptors but its own, nor handlers."""
    ours, theirs = os.open("/dev/zero", os.O_RDONLY), os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(ours, True)
    script = """
import fcntl, json, os
def flags(number):
    try:
        return fcntl.fcntl(number, fcntl.F_GETFD)
    except OSError:
        return None
descriptors = [number for number in range(1100) if flags(number) is not None]
print(json.dumps([dict(os.environ), descriptors, os.read(0, 1).decode()]))
"""

    def act() -> str:
        os.environ["OURS"] = "x"
        with compromised.start(script, inherit=(theirs,)) as child:
            child.wait()
            return os.read(child.stdout, 65536).decode()

    environment, descriptors, stdin = json.loads(in_child(act))
    # Python adds LC_CTYPE to its own environment where the locale is C. Source: PEP 538.
    environment.pop("LC_CTYPE", None)
    assert environment == {"LC_ALL": "C", "MALLOC_ARENA_MAX": "1", "PATH": "/usr/bin:/bin"}
    assert descriptors == [0, 1, 2, theirs]
    assert stdin == ""


@RIGHTS
@pytest.mark.parametrize("whose", ["worker", "root without a right", "caller"])
def test_sandbox_of_a_compromised_qemu_img_is_visible_in_proc(
    compromised: CompromisedProgram, whose: str, *, read_search: bool
) -> None:
    """/proc/PID/status and limits: uid, capabilities, no_new_privs, seccomp, signals, limits."""
    groups = (1600, 1700)
    whom = {
        "worker": spawn.Identity(uid=1500, gid=1500, groups=groups),
        "root without a right": None,
        "caller": spawn.Identity(uid=1234, gid=1234),
    }[whose]

    def act() -> tuple[dict[str, str], dict[str, list[str]], int]:
        confine_broker.narrow_broker()
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        wait, go = os.pipe()
        script = f"import os; print(1, flush=True); os.read({wait}, 1)"
        changed = compromised.but(identity=whom, keep_read_search=read_search)
        with changed.start(script, inherit=(wait,)) as child:
            os.set_blocking(child.stdout, True)
            assert os.read(child.stdout, 9) == b"1\n"
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
            rows = Path(f"/proc/{child.pid}/limits").read_text().splitlines()
            limits = {row[:25].strip(): row[26:].split()[:2] for row in rows[1:]}
            nice = os.getpriority(os.PRIO_PROCESS, child.pid)
            os.write(go, b"x")
            assert child.wait() == 0
        return dict(line.split(":\t", 1) for line in lines), limits, nice

    status, limits, nice = in_child(act)
    uid = {"worker": 1500, "root without a right": 0, "caller": 1234}[whose]
    assert status["Uid"].split() == [str(uid)] * 4
    assert status["Gid"].split() == [str(uid)] * 4
    if whose == "worker":
        assert status["Groups"].split() == ["1600", "1700"]
    kept = 1 << capabilities.Capability.DAC_READ_SEARCH if read_search else 0
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[name], 16) == kept, name
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    ignored_by_python = 1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)
    # 32 and 33 are the C library's own: no program can change how they are treated.
    of_the_library = 0b11 << 31
    assert int(status["SigIgn"], 16) & ~(ignored_by_python | of_the_library | 1 << 24) == 0
    assert int(status["SigBlk"], 16) == 0
    assert int(status["SigCgt"], 16) & 1 << (signal.SIGTERM - 1) == 0
    gib = str(1 << 30)
    assert limits["Max address space"] == [gib, gib]
    assert limits["Max open files"] == ["256", "256"]
    assert limits["Max core file size"] == ["1", "1"]
    assert limits["Max cpu time"] == ["30", "30"]
    assert nice == 19


def test_write_access_of_qemu_img_does_not_allow_chmod_or_execution(
    compromised: CompromisedProgram, public: Path
) -> None:
    """The inode can be written and cut through its descriptor, and not renamed or chmod-ed."""
    descriptor = os.open(public / "file", os.O_RDWR)
    script = f"""
name = "/proc/self/fd/{descriptor}"
attempt("open", lambda: os.open(name, os.O_RDWR | os.O_TRUNC))
attempt("cut", lambda: os.ftruncate({descriptor}, 0))
attempt("chmod", lambda: os.fchmod({descriptor}, 0o777))
attempt("chown", lambda: os.fchown({descriptor}, 1500, 1500))
attempt("setxattr", lambda: os.setxattr({descriptor}, "user.a", b"x"))
attempt("run", lambda: os.execv(name, ["x"]))
"""
    assert compromised.but(write=(descriptor,)).tries(script, inherit=(descriptor,)) == {
        "open": "done",
        "cut": "done",
        "chmod": "EPERM",
        "chown": "EPERM",
        "setxattr": "EPERM",
        "run": "EPERM",
    }
    os.close(descriptor)
