"""Whatever step fails, nothing runs: no process, no descriptor, and an error that says which."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import descriptors
import pytest
from children import in_child

from convertd_daemon.linux import landlock as kernel_landlock
from convertd_daemon.linux import prctl
from convertd_daemon.sandbox import (
    errors,
    identity,
    landlock,
    limits,
    runtime,
    seccomp,
    spawn,
)
from convertd_daemon.sandbox.errors import Stage
from convertd_daemon.sandbox.spawn import Confinement, Identity

Failed = tuple[str, str, list[str]]

WORKER = Identity(uid=1500, gid=1500)
VERSION = ["qemu-img", "--version"]
KILL_EVERYTHING = b"\x06\x00\x00\x00\x00\x00\x00\x80"  # BPF: return SECCOMP_RET_KILL_PROCESS


@pytest.fixture
def confinement(compiled: bytes) -> Confinement:
    """Give one that works."""
    return Confinement(identity=WORKER, filter=compiled)


def failure(act: Callable[[], object]) -> Failed:
    """Give the stage and errno of NotConfined, and what it left behind in this process."""
    before = descriptors.open_descriptors()
    try:
        act()
    except errors.NotConfined as error:
        outcome = error.stage.name, errno.errorcode.get(error.errno, "0")
    else:
        outcome = "RAN", "0"
    left = [
        f"descriptor {number}: {name}" for number, name in descriptors.open_descriptors() - before
    ]
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        pass
    else:
        left.append("a process")
    return (*outcome, left)


def start(
    program: int,
    confinement: Confinement,
    *,
    argv: Sequence[str] = VERSION,
    inherit: tuple[int, ...] = (),
) -> Callable[[], object]:
    """Give a call of spawn()."""
    return lambda: spawn.spawn(program, argv, confinement=confinement, inherit=inherit)


def test_program_is_not_started_without_the_right_to_change_uid(
    qemu_img: int, confinement: Confinement
) -> None:
    """An unprivileged process can't take another identity, and does not go on with its own."""

    def act() -> Failed:
        identity.assume(Identity(uid=1234, gid=1234))
        identity.limit_capabilities(())
        return failure(start(qemu_img, confinement))

    assert in_child(act) == ("IDENTITY", "EPERM", [])


def test_program_is_not_started_without_the_capability_to_keep(
    qemu_img: int, confinement: Confinement
) -> None:
    """It is not silently left out."""
    own = dataclasses.replace(confinement, identity=None, keep_read_search=True)

    def act() -> Failed:
        identity.assume(Identity(uid=1234, gid=1234))
        identity.limit_capabilities(())
        return failure(start(qemu_img, own))

    assert in_child(act) == ("CAPABILITIES", "EPERM", [])


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (b"", ("SECCOMP", "0", [])),
        (b"\xff" * 16, ("SECCOMP", "EINVAL", [])),
        (KILL_EVERYTHING, ("FORK", "0", [])),
    ],
    ids=["no filter", "a filter that the kernel refuses", "a filter that kills on the way"],
)
def test_program_is_not_started_without_a_working_seccomp_filter(
    qemu_img: int, confinement: Confinement, program: bytes, expected: Failed
) -> None:
    """Also a child that can't say why it died has not run the program."""
    changed = dataclasses.replace(confinement, filter=program)
    assert in_child(lambda: failure(start(qemu_img, changed))) == expected


def test_program_is_not_started_over_the_landlock_layer_limit(
    qemu_img: int, confinement: Confinement
) -> None:
    """Sixteen is the kernel's limit."""

    def act() -> Failed:
        prctl.set_no_new_privs()
        for _ in range(16):
            rules = runtime.rules(qemu_img)
            proc = landlock.Rule(where="/proc", access=landlock.READ_BENEATH)
            landlock.restrict((*rules, proc))
        return failure(start(qemu_img, confinement))

    assert in_child(act) == ("LANDLOCK", "E2BIG", [])


def test_program_is_not_started_without_landlock(
    qemu_img: int, confinement: Confinement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own error, for the operator."""
    monkeypatch.setattr(kernel_landlock, "abi", lambda: 0)

    def act() -> str:
        try:
            failure(start(qemu_img, confinement))
        except errors.LandlockMissing as error:
            return str(error)
        return "ran"

    assert "no landlock" in in_child(act)


@pytest.mark.parametrize("what", ["read", "write", "devices"])
def test_program_is_not_started_with_an_inode_landlock_can_not_govern(
    qemu_img: int, confinement: Confinement, what: str
) -> None:
    """A pipe where an image is due."""
    read_end, write_end = os.pipe()
    changes: dict[str, Any] = {what: (read_end,)}
    changed = dataclasses.replace(confinement, **changes)
    assert in_child(lambda: failure(start(qemu_img, changed))) == ("PREPARE", "EBADFD", [])
    os.close(read_end)
    os.close(write_end)


def test_program_is_not_started_with_a_closed_descriptor_to_inherit(
    qemu_img: int, confinement: Confinement
) -> None:
    """Its number must not be anybody else's by accident."""
    call = start(qemu_img, confinement, inherit=(666,))
    assert in_child(lambda: failure(call)) == ("DESCRIPTORS", "EBADF", [])


def test_program_is_not_started_where_its_own_number_is_taken(
    qemu_img: int, confinement: Confinement
) -> None:
    """By what the child still needs: so many descriptors are open."""

    def act() -> Failed:
        limits.raise_descriptors()
        program = os.dup2(qemu_img, limits.PROGRAM_DESCRIPTOR)
        return failure(start(program, confinement))

    assert in_child(act) == ("PREPARE", "EMFILE", [])


@pytest.mark.parametrize("number", [-1, 0, 2, 700, 4000])
def test_program_is_not_started_with_a_reserved_descriptor_to_inherit(
    qemu_img: int, confinement: Confinement, number: int
) -> None:
    """Our own mistake: the standard three, and the program's place."""

    def act() -> str:
        with pytest.raises(ValueError, match="can't inherit") as refused:
            spawn.spawn(qemu_img, VERSION, confinement=confinement, inherit=(number,))
        return str(refused.value)

    assert str(number) in in_child(act)


def test_program_is_not_started_from_a_process_with_threads(
    qemu_img: int, confinement: Confinement
) -> None:
    """Fork copies one thread, and the locks that others hold."""

    def act() -> str:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        with pytest.raises(ValueError, match="several threads") as refused:
            spawn.spawn(qemu_img, VERSION, confinement=confinement)
        return str(refused.value)

    assert in_child(act)


@pytest.mark.parametrize("standard", [0, 1, 2])
def test_program_is_not_started_with_a_closed_standard_descriptor(
    qemu_img: int, confinement: Confinement, standard: int
) -> None:
    """One of ours would get its number, and be overwritten."""

    def act() -> Failed:
        os.close(standard)
        return failure(start(qemu_img, confinement))

    assert in_child(act) == ("PREPARE", "EBADF", [])


def test_program_is_not_started_over_the_descriptor_limit(
    qemu_img: int, confinement: Confinement
) -> None:
    """A hard limit on descriptors that is too low."""

    def act() -> Failed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, 500))
        return failure(start(qemu_img, confinement))

    assert in_child(act) == ("DESCRIPTORS", "EBADF", [])


def test_program_is_not_started_without_free_descriptors(
    qemu_img: int, confinement: Confinement
) -> None:
    """Half of the pipes made are closed again."""

    def act() -> Failed:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        last = max(number for number, _ in descriptors.open_descriptors()) + 10
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, hard))
        taken = [os.open("/dev/null", os.O_RDONLY)]
        while taken[-1] < last:
            taken.append(os.open("/dev/null", os.O_RDONLY))
        for descriptor in taken[-3:]:
            os.close(descriptor)
        return failure(start(qemu_img, confinement))

    assert in_child(act) == ("PREPARE", "EMFILE", [])


def test_program_is_not_started_if_fork_fails(qemu_img: int, confinement: Confinement) -> None:
    """fork(2) fails, and the signals are as they were."""

    def act() -> tuple[Failed, bool]:
        identity.assume(Identity(uid=1999, gid=1999))
        identity.limit_capabilities(())
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        own = dataclasses.replace(confinement, identity=None)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        outcome = failure(start(qemu_img, own))
        return outcome, signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before

    assert in_child(act) == (("FORK", "EAGAIN", []), True)


def test_program_is_not_started_if_its_parent_has_died(
    qemu_img: int, confinement: Confinement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PDEATHSIG was armed too late, so the child kills itself."""
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert in_child(lambda: failure(start(qemu_img, confinement))) == ("FORK", "0", [])


def test_child_ends_after_an_unexpected_error_before_exec(
    qemu_img: int, confinement: Confinement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy of the parent ends, and does not go on as a second parent."""

    def broken(_: limits.Limits) -> None:
        raise LookupError("a bug")

    monkeypatch.setattr(limits, "apply", broken)

    def act() -> tuple[Failed, int]:
        return failure(start(qemu_img, confinement)), os.getpid()

    outcome, _ = in_child(act)
    assert outcome == ("FORK", "0", [])


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Callable[[bytes, int], int]]:
    """Give a maker of files that are open for reading."""
    opened: list[int] = []

    def make(content: bytes, mode: int) -> int:
        path = tmp_path / f"program{len(opened)}"
        path.write_bytes(content)
        path.chmod(mode)
        opened.append(os.open(path, os.O_RDONLY))
        return opened[-1]

    yield make
    for descriptor in opened:
        os.close(descriptor)


@pytest.mark.parametrize(
    "content",
    [b"", b"#!/bin/sh\n", b"\x7fELF\x01\x01" + bytes(90), b"\x7fELF\x02\x01" + bytes(20)],
    ids=["nothing", "a script", "a 32-bit program", "a header that is cut off"],
)
def test_file_that_is_not_a_program_is_refused(
    data: Callable[[bytes, int], int], confinement: Confinement, content: bytes
) -> None:
    """Found before anything is started."""
    program = data(content, 0o755)
    assert in_child(lambda: failure(start(program, confinement))) == ("PREPARE", "0", [])


def test_truncated_program_is_refused(data: Callable[[bytes, int], int]) -> None:
    """After its header, before its program headers."""
    whole = Path("/usr/bin/qemu-img").read_bytes()
    with pytest.raises(ValueError, match="cut off"):
        runtime.interpreter(data(whole[:70], 0o755))


def test_static_program_needs_no_loader(data: Callable[[bytes, int], int]) -> None:
    """No PT_INTERP, no rule."""
    whole = bytearray(Path("/usr/bin/qemu-img").read_bytes()[:64])
    whole[56:58] = b"\0\0"  # no program headers
    assert runtime.interpreter(data(bytes(whole), 0o755)) is None
    assert len(runtime.rules(data(bytes(whole), 0o755))) == 2


def test_program_without_execute_permission_fails(
    data: Callable[[bytes, int], int], confinement: Confinement
) -> None:
    """The last step fails, and the child ends."""
    program = data(Path("/usr/bin/qemu-img").read_bytes(), 0o644)
    assert in_child(lambda: failure(start(program, confinement))) == ("EXEC", "EACCES", [])


def test_argument_with_a_nul_byte_is_refused(qemu_img: int, confinement: Confinement) -> None:
    """It would be cut there."""
    call = start(qemu_img, confinement, argv=["qemu-img", "a\0b"])
    assert in_child(lambda: failure(call)) == ("EXEC", "0", [])


@pytest.mark.parametrize(
    ("uid", "gid", "groups"),
    [(0, 5, ()), (5, 0, ()), (5, 5, (0,)), (-1, 5, ())],
    ids=["uid 0", "gid 0", "group 0", "uid -1"],
)
def test_identity_with_uid_or_gid_0_is_refused(uid: int, gid: int, groups: tuple[int, ...]) -> None:
    """-1 means "leave it" to setresuid(2), which would leave root."""
    with pytest.raises(ValueError, match="not an identity"):
        Identity(uid=uid, gid=gid, groups=groups)


def test_sandbox_error_names_the_failed_step_and_the_reason() -> None:
    """One line for the journal."""
    error = errors.NotConfined(Stage.IDENTITY, errno.EPERM, "setresuid")
    assert str(error) == "not confined, so not run: identity: Operation not permitted (setresuid)"
    assert str(errors.NotConfined(Stage.FORK, 0)) == "not confined, so not run: fork: no answer"


def test_broker_does_not_start_without_a_seccomp_filter() -> None:
    """The reason is libseccomp's."""
    assert "can't compile" in str(errors.FilterMissing("no library"))
    assert issubclass(errors.FilterMissing, errors.SandboxError)
    assert seccomp.NEWEST_CALL >= 469
