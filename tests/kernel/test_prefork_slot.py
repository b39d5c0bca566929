"""The preforked child in a job's slot: what it holds, what confines it, and how it ends."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
from children import errno_of, in_child
from compromised import CompromisedProgram, output_of
from harness import processes, waiting

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


def child_pid() -> int:
    """Give the one child of this process."""
    (pid,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return int(pid)


def comm(pid: int) -> str:
    """Give the name under which the kernel lists a process."""
    return Path(f"/proc/{pid}/comm").read_text().strip()


def version(qemu_img: int, confinement: Confinement, slot: PreforkSlot) -> tuple[bool, str]:
    """Run a program; say whether the preforked child became it, and what it printed."""
    waited = child_pid()
    with spawn.spawn(qemu_img, VERSION, confinement=confinement, child=slot.take()) as child:
        return child.pid == waited, output_of(child)


@pytest.fixture
def confinement(compiled: bytes) -> Confinement:
    """Give one that works."""
    return Confinement(identity=OTHER, filter=compiled)


def test_preforked_child_becomes_the_program(qemu_img: int, confinement: Confinement) -> None:
    """No other process is forked, and the slot is empty afterwards."""

    def act() -> tuple[tuple[bool, str], bool]:
        slot = PreforkSlot(confinement.filter)
        slot.fork()
        return version(qemu_img, confinement, slot), slot.take() is None

    (is_it, said), nobody = in_child(act)
    assert is_it
    assert said.startswith("qemu-img version")
    assert nobody


def test_preforked_child_has_no_descriptor_but_its_channel(compiled: bytes) -> None:
    """Its end of a socket, and the standard three, of which input is nobody's."""

    def act() -> dict[int, str]:
        kept = os.open("/etc/passwd", os.O_RDONLY)
        slot = PreforkSlot(compiled)
        slot.fork()
        pid = child_pid()
        waiting.until(lambda: comm(pid) == "convertd-child", "the child waits")
        found = processes.descriptors(pid)
        slot.close()
        os.close(kept)
        return found

    found = in_child(act)
    (line,) = found.keys() - {0, 1, 2}
    assert found[line].startswith("socket:")
    assert found[0] == "/dev/null"


@pytest.mark.parametrize("order", ["forked first", "bound first"])
def test_job_can_kill_its_preforked_child_before_and_after_exec(
    qemu_img: int, confinement: Confinement, order: str
) -> None:
    """With all layers that a job has; but it signals nobody else."""
    outside = os.getpid()

    def act() -> tuple[str, int]:
        confine_broker.narrow_broker()
        slot = PreforkSlot(confinement.filter)
        if order == "bound first":
            confine.confine_job(slot, qemu_img, ())
        slot.fork()
        for _ in range(2):
            confine.confine_job(slot, qemu_img, ())
        argv = ["qemu-img", "--help"]
        with spawn.spawn(qemu_img, argv, confinement=confinement, child=slot.take()) as child:
            child.kill()
            status = child.wait()
        return errno_of(lambda: os.kill(outside, 0)), status

    assert in_child(act) == ("EPERM", -signal.SIGKILL)


def test_landlock_layer_of_the_job_applies_to_its_preforked_child(
    compromised: CompromisedProgram, tmp_path: Path
) -> None:
    """What its own confinement allows, and the job may not any more, it can't do."""
    (tmp_path / "file").write_text("x")
    script = f"print(open({str(tmp_path / 'file')!r}).read())"

    def reads(*, is_narrowed: bool) -> int:
        image = os.open(tmp_path / "file", os.O_RDONLY)
        own = compromised.but(identity=None).confinement
        own = dataclasses.replace(own, read=(image,))
        slot = PreforkSlot(own.filter)
        slot.fork()
        waiting_now = slot.take()
        assert waiting_now is not None
        if is_narrowed:
            # As a job of which only the preforked child is left to be confined.
            made = landlock.ruleset((*runtime.rules(compromised.program), *own.extra))
            waiting_now.add_landlock_layer(made)
        argv = ["python", "-I", "-S", "-B", "-c", script]
        with spawn.spawn(compromised.program, argv, confinement=own, child=waiting_now) as child:
            return child.wait()

    assert in_child(lambda: reads(is_narrowed=False)) == 0
    assert in_child(lambda: reads(is_narrowed=True)) == 1


def test_killed_preforked_child_is_replaced(qemu_img: int, confinement: Confinement) -> None:
    """Another is forked, and nothing of the first is left."""

    def act() -> tuple[bool, str]:
        slot = PreforkSlot(confinement.filter)
        slot.fork()
        dead = child_pid()
        os.kill(dead, signal.SIGKILL)
        os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)
        is_it, said = version(qemu_img, confinement, slot)
        assert not Path(f"/proc/{dead}").exists()
        return is_it, said

    is_it, said = in_child(act)
    assert not is_it
    assert said.startswith("qemu-img version")


@pytest.mark.parametrize("how", ["killed", "ended", "closed"])
def test_preforked_child_ends_with_its_job(compiled: bytes, how: str) -> None:
    """Whichever way that ends."""

    def act() -> int:
        slot = PreforkSlot(compiled)
        slot.fork()
        pid = child_pid()
        waiting.until(lambda: comm(pid) == "convertd-child", "the child waits")
        if how == "closed":
            slot.close()
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
def test_no_child_is_preforked_with_a_closed_standard_descriptor(
    compiled: bytes, standard: int
) -> None:
    """The socket would get its number."""

    def act() -> tuple[str, str]:
        os.close(standard)
        return errno_of(PreforkSlot(compiled).fork), Path(
            f"/proc/self/task/{os.getpid()}/children"
        ).read_text()

    assert in_child(act) == ("EBADF", "")


def test_preforked_child_with_another_filter_is_refused(
    qemu_img: int, confinement: Confinement
) -> None:
    """The filter is fixed at the fork; the child is killed and reaped."""

    def act() -> list[str]:
        waits = preforked.fork(b"another")
        with pytest.raises(ValueError, match="another filter"):
            spawn.spawn(qemu_img, VERSION, confinement=confinement, child=waits)
        return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()

    assert in_child(act) == []


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
