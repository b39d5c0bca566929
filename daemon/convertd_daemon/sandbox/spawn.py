"""Start a program in the sandbox. Fails closed: whatever step fails, the program does not run.

The Landlock ruleset, which takes our rights, and the pipes are made here. The child does the rest
on its way in: see entry.py.
"""

import contextlib
import errno
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from convertd_daemon.linux import unshare
from convertd_daemon.linux.capabilities import Capability
from convertd_daemon.sandbox import (
    entry,
    forking,
    landlock,
    limits,
    runtime,
)
from convertd_daemon.sandbox.entry import Entry, failing_as
from convertd_daemon.sandbox.errors import NotConfined, Stage
from convertd_daemon.sandbox.identity import Identity
from convertd_daemon.sandbox.limits import Limits
from convertd_daemon.sandbox.program import ConfinedProgram

__all__ = [
    "ConfinedProgram",
    "Confinement",
    "Identity",
    "Limits",
    "NotConfined",
    "spawn",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """All that a program may do. Descriptors are borrowed until spawn() returns.

    Attributes:
        identity: the user to become; None keeps the caller's uid, gid and groups. Either way no
            capability is left, but for the next one.
        keep_read_search: keep CAP_DAC_READ_SEARCH: the program may read what its uid may not,
            of what is allowed here.
        read: descriptors whose inodes it may open for reading, through /proc/self/fd or by path;
            also directories, with all beneath them.
        write: the same for reading, writing and truncating.
        devices: the same for block devices: as `write`, and ioctl(2).
        extra: further Landlock rules.
        limits: resource limits and niceness.
        filter: a compiled seccomp profile, seccomp.compile_profile(seccomp.QEMU_IMG).
        abi: pretend the kernel's Landlock is this old, for tests.
    """

    identity: Identity | None
    filter: bytes
    keep_read_search: bool = False
    read: tuple[int, ...] = ()
    write: tuple[int, ...] = ()
    devices: tuple[int, ...] = ()
    extra: tuple[landlock.Rule, ...] = ()
    limits: Limits = limits.CONVERT
    abi: int | None = None

    def rules(self) -> tuple[landlock.Rule, ...]:
        """Give the Landlock rules of these inodes; what it takes to start comes on top."""
        return (
            *(landlock.Rule(where=inode, access=landlock.READ) for inode in self.read),
            *(landlock.Rule(where=inode, access=landlock.WRITE) for inode in self.write),
            *(landlock.Rule(where=inode, access=landlock.DEVICE) for inode in self.devices),
            *self.extra,
        )


def spawn(
    program: int,
    argv: Sequence[str],
    *,
    confinement: Confinement,
    inherit: tuple[int, ...] = (),
) -> ConfinedProgram:
    """Execute a program, given as a descriptor open for reading, in the sandbox.

    `inherit` are descriptors that keep their numbers in it; besides them it has the standard
    three: /dev/null and two pipes. What such a descriptor was opened for, it can be used for, as
    Landlock judges at open(2) only: pass a source read-only. When this returns, the program has
    been executed. It is killed when the calling process dies, as long as that has CAP_KILL or the
    same uid.

    Raises:
        NotConfined: a step failed, and the program was not executed.
        LandlockMissing: the kernel has none.
        ValueError: the calling process has several threads, or a descriptor to inherit is one of
            the standard three or not below limits.PROGRAM_DESCRIPTOR.
    """
    _refuse_misuse(inherit)
    with contextlib.ExitStack() as ours:
        with contextlib.ExitStack() as theirs:
            with failing_as(Stage.PREPARE):
                _check_standard_descriptors()
                stdout, stdout_end = _pipe(ours, theirs)
                stderr, stderr_end = _pipe(ours, theirs)
                report, report_end = _pipe(ours, theirs)
                ruleset = _ruleset(program, confinement)
                theirs.callback(os.close, ruleset)
                asked = Entry(
                    parent=os.getpid(),
                    argv=argv,
                    identity=confinement.identity,
                    keep=(Capability.DAC_READ_SEARCH,) if confinement.keep_read_search else (),
                    limits=confinement.limits,
                    compiled=confinement.filter,
                    program=program,
                    ruleset=ruleset,
                    stdout=stdout_end,
                    stderr=stderr_end,
                    report=report_end,
                    inherit=inherit,
                )
                _check_numbers(asked)
            # A signal that is handled in between, and ends the job, would leave an unknown child.
            with failing_as(Stage.FORK), forking.signals_blocked():
                pid = forking.fork(lambda: entry.enter(asked), keep=(*asked.own(), *inherit))
                ours.callback(_kill_and_reap, pid)
                pidfd = os.pidfd_open(pid)
                ours.callback(os.close, pidfd)
        _await_exec(report)
        ours.pop_all()
        os.close(report)
    return ConfinedProgram(pid=pid, pidfd=pidfd, stdout=stdout, stderr=stderr)


def _refuse_misuse(inherit: tuple[int, ...]) -> None:
    if not unshare.is_single_threaded():
        raise ValueError("can't fork safely: this process has several threads")
    if not all(entry.FIRST_FREE <= number < limits.PROGRAM_DESCRIPTOR for number in inherit):
        raise ValueError(f"can't inherit descriptors {inherit}")


def _check_standard_descriptors() -> None:
    """Make sure that no descriptor made now gets one of the numbers that the program's own have.

    Raises:
        OSError: one of them is free.
    """
    for standard in range(entry.FIRST_FREE):
        os.fstat(standard)


def _check_numbers(asked: Entry) -> None:
    """Make sure that the program's place is none that the child still needs.

    Raises:
        OSError: it is; so many descriptors are open.
    """
    if limits.PROGRAM_DESCRIPTOR in asked.own():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def _pipe(ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[int, int]:
    read_end, write_end = os.pipe()
    ours.callback(os.close, read_end)
    theirs.callback(os.close, write_end)
    return read_end, write_end


def _ruleset(program: int, confinement: Confinement) -> int:
    rules = (*runtime.rules(program), *confinement.rules())
    return landlock.ruleset(rules, abi=confinement.abi)


def _kill_and_reap(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _await_exec(report: int) -> None:
    """Wait until the program has been executed, which closes the pipe's other end.

    Raises:
        NotConfined: a step failed.
    """
    with failing_as(Stage.FORK):
        text = b"".join(iter(lambda: os.read(report, entry.REPORT_BYTES), b""))
    if text == entry.CONFINED:
        return
    if not text.strip(entry.CONFINED):
        raise NotConfined(Stage.FORK, 0, "the child died on its way into the sandbox")
    stage, error, detail = text.removeprefix(entry.CONFINED).decode(errors="replace").split(" ", 2)
    raise NotConfined(Stage(stage), int(error), detail)
