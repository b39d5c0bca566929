"""Processes of ours that go on running: broker, front and job give up what they don't need."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from children import errno_of, in_child, no_new_privs
from compromised import WORKER, CompromisedProgram, output_of

from convertd_daemon.linux import capabilities, prctl
from convertd_daemon.linux.capabilities import Capability
from convertd_daemon.sandbox import (
    confine,
    confine_broker,
    errors,
    identity,
    landlock,
    seccomp,
    spawn,
)
from convertd_daemon.sandbox.identity import Identity
from convertd_daemon.sandbox.spawn import Confinement

FRONT = Identity(uid=1501, gid=1501)


def status_of_threads() -> list[dict[str, str]]:
    """Read what the kernel shows of every thread."""
    return [
        dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
        for task in Path("/proc/self/task").iterdir()
    ]


class TestBroker:
    """narrow_broker()."""

    def test_broker_keeps_seven_capabilities(self) -> None:
        """And no way to more: bounding set, ambient set, no_new_privs."""

        def act() -> dict[str, str]:
            every = frozenset(capabilities.capget().permitted)
            capabilities.capset(
                capabilities.Sets(effective=every, permitted=every, inheritable=every)
            )
            prctl.cap_ambient_raise(Capability.SYS_ADMIN)
            confine_broker.narrow_broker()
            return status_of_threads()[0]

        status = in_child(act)
        seven = sum(1 << capability for capability in confine_broker.BROKER)
        assert seven.bit_count() == 7
        assert [int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")] == [seven] * 3
        assert [int(status[name], 16) for name in ("CapInh", "CapAmb")] == [0, 0]
        assert status["NoNewPrivs"] == "1"

    def test_narrowing_the_broker_twice_changes_nothing(self) -> None:
        """As under a unit that has narrowed already, without CAP_SETPCAP."""

        def act() -> bool:
            confine_broker.narrow_broker()
            once = capabilities.capget()
            confine_broker.narrow_broker()
            return capabilities.capget() == once

        assert in_child(act)

    def test_broker_without_a_required_capability_does_not_start(self) -> None:
        """All that are missing are named."""

        def act() -> str:
            few = confine_broker.BROKER - {Capability.KILL, Capability.CHOWN}
            capabilities.capset(capabilities.Sets(effective=few, permitted=few))
            with pytest.raises(errors.CapabilityMissing) as refused:
                confine_broker.narrow_broker()
            return str(refused.value)

        assert in_child(act) == "this process lacks CAP_CHOWN, CAP_KILL"

    def test_bounding_set_that_can_not_be_narrowed_is_an_error(self) -> None:
        """Not silently left wide."""

        def act() -> str:
            capabilities.capset(
                capabilities.Sets(effective=confine_broker.BROKER, permitted=confine_broker.BROKER)
            )
            with pytest.raises(errors.CapabilityMissing) as refused:
                confine_broker.narrow_broker()
            return str(refused.value)

        assert in_child(act) == "this process lacks CAP_SETPCAP"

    def test_narrowed_broker_can_still_do_its_work(self, tmp_path: Path) -> None:
        """Read what is another's, give away, end another's process."""
        (tmp_path / "file").touch(0o000)
        os.chown(tmp_path / "file", 4321, 4321)

        def act() -> tuple[list[str], int]:
            confine_broker.narrow_broker()
            victim = os.fork()
            if victim == 0:
                identity.assume(FRONT)
                identity.limit_capabilities(())
                signal.pause()
            name = tmp_path / "file"
            results = [
                errno_of(lambda: os.open(name, os.O_RDWR)),
                errno_of(lambda: os.chown(name, 1234, 1234)),
                errno_of(lambda: os.chmod(name, 0o600)),
                errno_of(lambda: os.kill(victim, signal.SIGKILL)),
                errno_of(lambda: os.mknod(tmp_path / "disk", 0o60600, os.makedev(7, 0))),
                errno_of(lambda: socket.sethostname("x")),
            ]
            return results, os.waitpid(victim, 0)[1]

        assert in_child(act) == ([*["done"] * 4, "EPERM", "EPERM"], signal.SIGKILL)


class TestFrontConfinement:
    """confine_front()."""

    @pytest.fixture
    def private(self, tmp_path: Path) -> Path:
        """Give the front's own directory."""
        os.chown(tmp_path, FRONT.uid, FRONT.gid)
        return tmp_path

    @pytest.fixture
    def confine_here(self, private: Path) -> Callable[[], None]:
        """Give what makes a child the front, in its directory."""
        compiled = seccomp.compile_profile(seccomp.FRONT)
        directory = os.open(private, os.O_PATH)

        def enter() -> None:
            identity.assume(FRONT)
            identity.limit_capabilities(())
            confine.confine_front(directory, compiled)
            os.fchdir(directory)

        return enter

    def test_confined_front_can_use_its_sockets_and_threads(
        self, confine_here: Callable[[], None]
    ) -> None:
        """Bind in its directory, connect, unlink; start threads afterwards; randomness."""

        def act() -> bytes:
            confine_here()
            with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
                server.bind("own")
                server.listen()
                client.bind("")  # an abstract name, as the relay's upstream ends have
                accepting = threading.Thread(target=lambda: server.accept()[0].sendall(b"hello"))
                accepting.start()
                client.connect("own")
                accepting.join()
                os.unlink("own")
                with open("/dev/urandom", "rb") as random:
                    return client.recv(9) + random.read(0)

        assert in_child(act) == b"hello"

    def test_confined_front_can_do_nothing_else(self, confine_here: Callable[[], None]) -> None:
        """Files, programs, networks, other processes."""
        parent = os.getpid()

        def act() -> dict[str, str]:
            confine_here()
            return {
                "read": errno_of(lambda: os.open("/etc/passwd", os.O_RDONLY)),
                "proc": errno_of(lambda: os.open("/proc/self/status", os.O_RDONLY)),
                "create": errno_of(lambda: os.open("file", os.O_CREAT | os.O_WRONLY)),
                "mkdir": errno_of(lambda: os.mkdir("directory")),
                "program": errno_of(lambda: os.execv("/bin/true", ["true"])),
                "fork": errno_of(os.fork),
                "tcp": errno_of(socket.socket),
                "signal": errno_of(lambda: os.kill(parent, 0)),
                "chmod": errno_of(lambda: os.chmod(".", 0o700)),
                "namespace": errno_of(unshare_user_namespace),
            }

        assert in_child(act) == {
            "read": "EACCES",
            "proc": "EACCES",
            "create": "EACCES",
            "mkdir": "EACCES",
            "program": "EPERM",
            "fork": "EPERM",
            "tcp": "EAFNOSUPPORT",
            "signal": "EPERM",
            "chmod": "EPERM",
            "namespace": "EPERM",
        }

    def test_threads_started_after_the_confinement_are_confined(
        self, confine_here: Callable[[], None]
    ) -> None:
        """Shown by the kernel, which we ask from outside."""
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                confine_here()
                for _ in range(3):
                    threading.Thread(target=signal.pause, daemon=True).start()
                os.write(write_end, b"x")
                signal.pause()
            finally:
                os._exit(1)
        os.close(write_end)
        assert os.read(read_end, 1) == b"x"
        tasks = [
            dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
            for task in Path(f"/proc/{pid}/task").iterdir()
        ]
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert len(tasks) == 4
        for task in tasks:
            assert (task["NoNewPrivs"], task["Seccomp"]) == ("1", "2")
            assert [int(task[name], 16) for name in ("CapPrm", "CapEff", "CapAmb")] == [0] * 3
            assert task["Uid"].split() == [str(FRONT.uid)] * 4


def unshare_user_namespace() -> None:
    """Call unshare(CLONE_NEWUSER)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x10000000):
        raise OSError(ctypes.get_errno(), "unshare")


def in_the_midst_of_threads(act: Callable[[], object]) -> bool:
    """See that it is refused in a process with two threads; say whether that could still gain."""
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    with pytest.raises(ValueError, match="several threads"):
        act()
    return not no_new_privs()


def test_front_with_threads_is_not_confined_but_refused() -> None:
    """The others would stay free."""
    assert in_child(lambda: in_the_midst_of_threads(lambda: confine.confine_front("/", b"")))


def test_job_with_threads_is_not_confined_but_refused(qemu_img: int) -> None:
    """The others would stay free."""

    def act() -> tuple[bool, str]:
        is_free = in_the_midst_of_threads(lambda: confine.confine_job(qemu_img, ()))
        return is_free, errno_of(lambda: os.close(os.open("/etc/passwd", os.O_RDONLY)))

    assert in_child(act) == (True, "done")


def test_job_can_kill_its_qemu_img_and_signal_no_other_process(
    qemu_img: int, compiled: bytes
) -> None:
    """With all the layers that a job has, of which each is about signals."""
    outside = os.getpid()
    confinement = Confinement(identity=WORKER, filter=compiled)

    def act() -> tuple[str, int]:
        confine_broker.narrow_broker()
        for _ in range(3):
            confine.confine_job(qemu_img, ())
        with spawn.spawn(qemu_img, ["qemu-img", "--help"], confinement=confinement) as child:
            child.kill()
            status = child.wait()
        return errno_of(lambda: os.kill(outside, 0)), status

    assert in_child(act) == ("EPERM", -signal.SIGKILL)


def test_landlock_layer_of_a_job_binds_its_program_too(
    compromised: CompromisedProgram, tmp_path: Path
) -> None:
    """What its own confinement allows, and the job may not any more, it can't do."""
    (tmp_path / "file").write_text("x")
    script = f"print(open({str(tmp_path / 'file')!r}).read())"

    def reads(*, is_narrowed: bool) -> int:
        image = os.open(tmp_path / "file", os.O_RDONLY)
        own = compromised.but(identity=None).confinement
        own = dataclasses.replace(own, read=(image,))
        if is_narrowed:
            confine.confine_job(compromised.program, own.extra)
        argv = ["python", "-I", "-S", "-B", "-c", script]
        with spawn.spawn(compromised.program, argv, confinement=own) as child:
            return child.wait()

    assert in_child(lambda: reads(is_narrowed=False)) == 0
    assert in_child(lambda: reads(is_narrowed=True)) == 1


def test_job_can_access_only_the_granted_files(qemu_img: int, tmp_path: Path) -> None:
    """Read here, publish there, and signal nobody outside, though it has the broker's rights."""
    for name in ("read", "write", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    parent = os.getpid()

    def act() -> dict[str, str]:
        confine_broker.narrow_broker()
        rules = [
            landlock.Rule(where=str(tmp_path / "read"), access=landlock.READ_BENEATH),
            landlock.Rule(where=str(tmp_path / "write"), access=landlock.PUBLISH_IN),
        ]
        confine.confine_job(qemu_img, rules)
        create = os.O_CREAT | os.O_WRONLY
        return {
            "read": errno_of(lambda: os.open(tmp_path / "read" / "file", os.O_RDONLY)),
            "write to read": errno_of(lambda: os.open(tmp_path / "read" / "file", os.O_RDWR)),
            "create": errno_of(lambda: os.open(tmp_path / "write" / "new", create)),
            "remove": errno_of(lambda: os.unlink(tmp_path / "write" / "file")),
            "create elsewhere": errno_of(lambda: os.open(tmp_path / "other" / "n", create)),
            "read elsewhere": errno_of(lambda: os.open(tmp_path / "other" / "file", os.O_RDONLY)),
            "another program": errno_of(lambda: os.execv("/bin/true", ["true"])),
            "the broker": errno_of(lambda: os.kill(parent, 0)),
        }

    assert in_child(act) == {
        "read": "done",
        "write to read": "EACCES",
        "create": "done",
        "remove": "done",
        "create elsewhere": "EACCES",
        "read elsewhere": "EACCES",
        "another program": "EACCES",
        "the broker": "EPERM",
    }


def test_inherited_descriptors_keep_their_numbers(compromised: CompromisedProgram) -> None:
    """Whichever way they are numbered where they come from."""
    script = "import os; print(*(os.pread(n, 9, 0).decode() for n in (3, 4, 5, 200, 699)))"

    def act() -> str:
        numbers = (5, 699, 3, 200, 4)
        kept = os.dup(compromised.program), os.dup(0)
        contents = []
        for number in numbers:
            memory = os.memfd_create("image")
            os.write(memory, str(number).encode())
            contents.append(memory)
        moved = [os.dup(memory) for memory in contents]
        while max(moved) < 1000:
            moved.append(os.dup(moved[0]))
        program = os.dup(kept[0])
        for number, memory in zip(numbers, moved, strict=False):
            os.dup2(os.open(f"/proc/self/fd/{memory}", os.O_RDONLY), number)
        argv = ["python", "-I", "-S", "-B", "-c", script]
        own = compromised.confinement
        with spawn.spawn(program, argv, confinement=own, inherit=numbers) as child:
            return output_of(child)

    assert in_child(act).split() == ["3", "4", "5", "200", "699"]
