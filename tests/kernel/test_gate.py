"""Who waits to become a program: what it holds, what binds it, and how it ends."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
from children import errno_of, in_child
from harness import processes, waiting
from intruder import Intruder, output_of

from convertd_daemon.sandbox import (
    confine,
    confine_broker,
    landlock,
    preforked,
    runtime,
    spawn,
)
from convertd_daemon.sandbox.prefork_slot import PreforkSlot
from convertd_daemon.sandbox.spawn import Confinement, Identity

VERSION = ["qemu-img", "--version"]
OTHER = Identity(uid=1500, gid=1500)


def who_waits() -> int:
    """Give the one child of this process."""
    (pid,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return int(pid)


def comm(pid: int) -> str:
    """Give the name under which the kernel lists a process."""
    return Path(f"/proc/{pid}/comm").read_text().strip()


def version(qemu_img: int, confinement: Confinement, gate: PreforkSlot) -> tuple[bool, str]:
    """Run a program; say whether it is in the process that waited, and what it said."""
    waited = who_waits()
    with spawn.spawn(qemu_img, VERSION, confinement=confinement, waiting=gate.take()) as child:
        return child.pid == waited, output_of(child)


@pytest.fixture
def confinement(compiled: bytes) -> Confinement:
    """Give one that works."""
    return Confinement(identity=OTHER, filter=compiled)


def test_who_waits_becomes_the_program(qemu_img: int, confinement: Confinement) -> None:
    """No other process is forked, and nobody waits afterwards."""

    def act() -> tuple[tuple[bool, str], bool]:
        gate = PreforkSlot(confinement.filter)
        gate.fork()
        return version(qemu_img, confinement, gate), gate.take() is None

    (is_it, said), nobody = in_child(act)
    assert is_it
    assert said.startswith("qemu-img version")
    assert nobody


def test_who_waits_holds_nothing(compiled: bytes) -> None:
    """Its end of a socket, and the standard three, of which input is nobody's."""

    def act() -> dict[int, str]:
        kept = os.open("/etc/passwd", os.O_RDONLY)
        gate = PreforkSlot(compiled)
        gate.fork()
        pid = who_waits()
        waiting.until(lambda: comm(pid) == "convertd-child", "it is at the gate")
        held = processes.descriptors(pid)
        gate.close()
        os.close(kept)
        return held

    held = in_child(act)
    (line,) = held.keys() - {0, 1, 2}
    assert held[line].startswith("socket:")
    assert held[0] == "/dev/null"


@pytest.mark.parametrize("order", ["forked first", "bound first"])
def test_a_job_ends_who_waits_and_what_it_becomes(
    qemu_img: int, confinement: Confinement, order: str
) -> None:
    """With all layers that a job has; but it signals nobody else."""
    outside = os.getpid()

    def act() -> tuple[str, int]:
        confine_broker.narrow_broker()
        gate = PreforkSlot(confinement.filter)
        if order == "bound first":
            confine.confine_job(gate, qemu_img, ())
        gate.fork()
        for _ in range(2):
            confine.confine_job(gate, qemu_img, ())
        argv = ["qemu-img", "--help"]
        with spawn.spawn(qemu_img, argv, confinement=confinement, waiting=gate.take()) as child:
            child.kill()
            status = child.wait()
        return errno_of(lambda: os.kill(outside, 0)), status

    assert in_child(act) == ("EPERM", -signal.SIGKILL)


def test_a_layer_of_the_jobs_binds_who_waits_too(intruder: Intruder, tmp_path: Path) -> None:
    """What its own confinement allows, and the job may not any more, it can't do."""
    (tmp_path / "file").write_text("x")
    script = f"print(open({str(tmp_path / 'file')!r}).read())"

    def reads(*, is_narrowed: bool) -> int:
        image = os.open(tmp_path / "file", os.O_RDONLY)
        own = intruder.but(identity=None).confinement
        own = dataclasses.replace(own, read=(image,))
        gate = PreforkSlot(own.filter)
        gate.fork()
        waiting_now = gate.take()
        assert waiting_now is not None
        if is_narrowed:
            # As a job of which only who waits is left to be bound.
            made = landlock.ruleset((*runtime.rules(intruder.program), *own.extra))
            waiting_now.add_landlock_layer(made)
        argv = ["python", "-I", "-S", "-B", "-c", script]
        with spawn.spawn(intruder.program, argv, confinement=own, waiting=waiting_now) as child:
            return child.wait()

    assert in_child(lambda: reads(is_narrowed=False)) == 0
    assert in_child(lambda: reads(is_narrowed=True)) == 1


def test_one_that_was_killed_is_not_missed(qemu_img: int, confinement: Confinement) -> None:
    """Another is forked, and nothing of the first is left."""

    def act() -> tuple[bool, str]:
        gate = PreforkSlot(confinement.filter)
        gate.fork()
        dead = who_waits()
        os.kill(dead, signal.SIGKILL)
        os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)
        is_it, said = version(qemu_img, confinement, gate)
        assert not Path(f"/proc/{dead}").exists()
        return is_it, said

    is_it, said = in_child(act)
    assert not is_it
    assert said.startswith("qemu-img version")


@pytest.mark.parametrize("how", ["killed", "ended", "closed"])
def test_it_does_not_outlive_its_job(compiled: bytes, how: str) -> None:
    """Whichever way that ends."""

    def act() -> int:
        gate = PreforkSlot(compiled)
        gate.fork()
        pid = who_waits()
        waiting.until(lambda: comm(pid) == "convertd-child", "it is at the gate")
        if how == "closed":
            gate.close()
            assert not Path(f"/proc/{pid}").exists()
        if how == "killed":
            os.write(tell, str(pid).encode())
            os.kill(os.getpid(), signal.SIGKILL)
        return pid

    read_end, tell = os.pipe()
    if how == "killed":
        with pytest.raises(ChildProcessError):
            in_child(act)
        pid = int(os.read(read_end, 64))
    else:
        pid = in_child(act)
    os.close(read_end)
    os.close(tell)
    waiting.until(lambda: not processes.exists(pid), "it is gone")


@pytest.mark.parametrize("standard", [0, 1, 2])
def test_nobody_waits_where_a_standard_descriptor_is_closed(compiled: bytes, standard: int) -> None:
    """The socket would get its number."""

    def act() -> tuple[str, str]:
        os.close(standard)
        return errno_of(PreforkSlot(compiled).fork), Path(
            f"/proc/self/task/{os.getpid()}/children"
        ).read_text()

    assert in_child(act) == ("EBADF", "")


def test_one_for_another_filter_is_not_taken(qemu_img: int, confinement: Confinement) -> None:
    """What is to be loaded was settled when it was forked; it is put down."""

    def act() -> list[str]:
        waits = preforked.fork(b"another")
        with pytest.raises(ValueError, match="another filter"):
            spawn.spawn(qemu_img, VERSION, confinement=confinement, waiting=waits)
        return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()

    assert in_child(act) == []


def test_many_descriptors_keep_their_numbers(intruder: Intruder) -> None:
    """Whichever way they are numbered where they come from."""
    script = "import os; print(*(os.pread(n, 9, 0).decode() for n in (3, 4, 5, 200, 699)))"

    def act() -> str:
        numbers = (5, 699, 3, 200, 4)
        kept = os.dup(intruder.program), os.dup(0)
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
        own = intruder.confinement
        with spawn.spawn(program, argv, confinement=own, inherit=numbers) as child:
            return output_of(child)

    assert in_child(act).split() == ["3", "4", "5", "200", "699"]
