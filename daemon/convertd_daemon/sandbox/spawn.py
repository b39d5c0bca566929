"""Start a program in the sandbox. Fails closed: whatever step fails, the program does not run.

The Landlock ruleset, which takes our rights, and the pipes are made here. The child that becomes
the program does the rest: see preforked.py.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from convertd_daemon.linux import unshare
from convertd_daemon.linux.capabilities import Capability
from convertd_daemon.sandbox import (
    landlock,
    limits,
    preforked,
    runtime,
)
from convertd_daemon.sandbox.errors import NotConfined, Stage
from convertd_daemon.sandbox.identity import Identity
from convertd_daemon.sandbox.limits import Limits
from convertd_daemon.sandbox.preforked import PreforkedChild, failing_as
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
    child: PreforkedChild | None = None,
) -> ConfinedProgram:
    """Execute a program, given as a descriptor open for reading, in the sandbox.

    `inherit` are descriptors that keep their numbers in it; besides them it has the standard
    three: /dev/null and two pipes. What such a descriptor was opened for, it can be used for, as
    Landlock judges at open(2) only: pass a source read-only. When this returns, the program has
    been executed. It is killed when the calling process dies, as long as that has CAP_KILL or the
    same uid. `child`, which this takes over, becomes it; without one, one is forked.

    Raises:
        NotConfined: a step failed, and the program was not executed.
        LandlockMissing: the kernel has none.
        ValueError: the calling process has several threads, a descriptor to inherit is one of the
            standard three or not below limits.PROGRAM_DESCRIPTOR, or `child` has another filter.
    """
    with contextlib.ExitStack() as ours:
        if child is not None:
            ours.enter_context(child)
        _refuse_misuse(inherit, confinement, child)
        with contextlib.ExitStack() as theirs:
            with failing_as(Stage.PREPARE):
                preforked.check_standard_descriptors()
                stdout, stdout_end = _pipe(ours, theirs)
                stderr, stderr_end = _pipe(ours, theirs)
                ruleset = _ruleset(program, confinement)
                theirs.callback(os.close, ruleset)
            with failing_as(Stage.FORK):
                becoming = child or ours.enter_context(preforked.fork(confinement.filter))
            descriptors = preforked.ProgramDescriptors(
                program=program,
                ruleset=ruleset,
                stdout=stdout_end,
                stderr=stderr_end,
                inherit=inherit,
            )
            with failing_as(Stage.DESCRIPTORS):
                becoming.become(_spec(argv, confinement, inherit), descriptors)
        becoming.await_exec()
        ours.pop_all()
    pid, pidfd = becoming.release()
    return ConfinedProgram(pid=pid, pidfd=pidfd, stdout=stdout, stderr=stderr)


def _refuse_misuse(
    inherit: tuple[int, ...], confinement: Confinement, child: PreforkedChild | None
) -> None:
    if not unshare.is_single_threaded():
        raise ValueError("can't fork safely: this process has several threads")
    if not all(preforked.FIRST_FREE <= number < limits.PROGRAM_DESCRIPTOR for number in inherit):
        raise ValueError(f"can't inherit descriptors {inherit}")
    if child is not None and child.compiled != confinement.filter:
        raise ValueError("the preforked child has another filter")


def _pipe(ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[int, int]:
    read_end, write_end = os.pipe()
    ours.callback(os.close, read_end)
    theirs.callback(os.close, write_end)
    return read_end, write_end


def _ruleset(program: int, confinement: Confinement) -> int:
    rules = (*runtime.rules(program), *confinement.rules())
    return landlock.ruleset(rules, abi=confinement.abi)


def _spec(
    argv: Sequence[str], confinement: Confinement, inherit: tuple[int, ...]
) -> preforked.ProgramSpec:
    return preforked.ProgramSpec(
        argv=tuple(argv),
        identity=confinement.identity,
        keep=(Capability.DAC_READ_SEARCH,) if confinement.keep_read_search else (),
        limits=confinement.limits,
        inherit=inherit,
    )
