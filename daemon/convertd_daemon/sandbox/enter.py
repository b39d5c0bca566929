"""Start a program in the sandbox. Fails closed: whatever step fails, the program does not run.

The parent makes all that can be made before fork(2): the Landlock ruleset, with the rights that the
parent has, and the pipes. The child then gives up one thing after the other, in an order
that the kernel forces:

    signals, descriptors    nothing of ours reaches the program
    identity, capabilities  setresuid(2) empties sets and disarms PDEATHSIG, so it goes first
    no_new_privs            Landlock and seccomp demand it
    parent                  PDEATHSIG, after the last change of identity; then: is it still there
    limits                  need setrlimit(2), for the child itself
    landlock, seccomp       last: the filter refuses much of the above
    exec                    the opened program itself, through the filter's one gap
"""

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from convertd_daemon.kernel import close_range, execveat, prctl, unshare
from convertd_daemon.kernel.capabilities import Capability
from convertd_daemon.sandbox import identity, landlock, limits, runtime, seccomp
from convertd_daemon.sandbox.child import Child
from convertd_daemon.sandbox.errors import NotConfined, Stage
from convertd_daemon.sandbox.identity import Identity
from convertd_daemon.sandbox.limits import Limits

__all__ = [
    "Child",
    "Confinement",
    "Identity",
    "Limits",
    "NotConfined",
    "signals_blocked",
    "spawn",
]

ENVIRONMENT: Final[Mapping[str, str]] = {
    "LC_ALL": "C",
    # Else up to 66 threads take 1.2 GiB of address space; no slower with one arena.
    "MALLOC_ARENA_MAX": "1",
    "PATH": "/usr/bin:/bin",
}

_SIGNALS: Final = frozenset(signal.valid_signals())
_FIRST_FREE: Final = 3
_CONFINED: Final = b"."  # the child's last word before exec
_REPORT_BYTES: Final = 4096
_EXIT_NOT_CONFINED: Final = 127


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """All that a program may do. Descriptors are borrowed until spawn() returns.

    Attributes:
        identity: whom to become; None keeps the caller's uid, gid and groups. Either way no
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ends:
    """What the parent made for the child; each is closed in the parent after fork(2)."""

    program: int
    ruleset: int
    null: int
    stdout: int
    stderr: int
    report: int
    parent: int
    inherit: tuple[int, ...]

    def descriptors(self) -> tuple[int, ...]:
        """Give all that must be open in the child until exec."""
        return (self.program, self.ruleset, self.null, self.stdout, self.stderr, self.report)


def spawn(
    program: int,
    argv: Sequence[str],
    *,
    confinement: Confinement,
    inherit: tuple[int, ...] = (),
) -> Child:
    """Execute a program, given as a descriptor open for reading, in the sandbox.

    `inherit` are descriptors that keep their numbers in it; besides them it has the standard
    three: /dev/null and two pipes. What such a descriptor was opened for, it can be used for, as
    Landlock judges at open(2) only: pass a source read-only. When this returns, the program has
    been executed. It is killed when the calling process dies, as long as that has CAP_KILL or the
    same uid.

    Raises:
        NotConfined: a step failed, and the program was not executed.
        LandlockMissing: the kernel has none.
        ValueError: the calling process has several threads, or a descriptor to inherit is one
            of the standard three or not below limits.PROGRAM_DESCRIPTOR.
    """
    _refuse_misuse(inherit)
    with contextlib.ExitStack() as ours:
        with contextlib.ExitStack() as theirs:
            with _failing_as(Stage.PREPARE):
                _check_standard_descriptors()
                stdout, stdout_end = _pipe(ours, theirs)
                stderr, stderr_end = _pipe(ours, theirs)
                report, report_end = _pipe(ours, theirs)
                ends = _Ends(
                    program=program,
                    ruleset=_kept(theirs, _ruleset(program, confinement)),
                    null=_kept(theirs, os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)),
                    stdout=stdout_end,
                    stderr=stderr_end,
                    report=report_end,
                    parent=os.getpid(),
                    inherit=inherit,
                )
                _check_numbers(ends)
            with _failing_as(Stage.FORK), signals_blocked():
                pid = _fork(ends, argv, confinement)
                ours.callback(_put_down, pid)
                pidfd = _kept(ours, os.pidfd_open(pid))
        _await_exec(report)
        ours.pop_all()
        os.close(report)
    return Child(pid=pid, pidfd=pidfd, stdout=stdout, stderr=stderr)


def _refuse_misuse(inherit: tuple[int, ...]) -> None:
    if not unshare.is_single_threaded():
        raise ValueError("can't fork safely: this process has several threads")
    if not all(_FIRST_FREE <= number < limits.PROGRAM_DESCRIPTOR for number in inherit):
        raise ValueError(f"can't inherit descriptors {inherit}")


@contextlib.contextmanager
def _failing_as(stage: Stage) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NotConfined(stage, error.errno or 0, str(error)) from error
    except ValueError as error:
        raise NotConfined(stage, 0, str(error)) from error


def _pipe(ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[int, int]:
    read_end, write_end = os.pipe()
    ours.callback(os.close, read_end)
    theirs.callback(os.close, write_end)
    return read_end, write_end


def _kept(stack: contextlib.ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


def _ruleset(program: int, confinement: Confinement) -> int:
    rules = (*runtime.rules(program), *confinement.rules())
    return landlock.ruleset(rules, abi=confinement.abi)


def _check_standard_descriptors() -> None:
    """Make sure that no number is free which the child's dup2(2) will overwrite."""
    for standard in range(_FIRST_FREE):
        os.fstat(standard)


def _check_numbers(ends: _Ends) -> None:
    """Make sure that the program's place is not one that the child still needs."""
    if max(ends.descriptors()) >= limits.PROGRAM_DESCRIPTOR:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Hold signals back in the parent until the child is in safe hands; in the child, for good.

    The child still has our handlers, and our wakeup descriptor to write to; and a handler that
    raises here would leave behind a child that nobody knows.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _fork(ends: _Ends, argv: Sequence[str], confinement: Confinement) -> int:
    pid = os.fork()
    if pid == 0:
        _become(ends, argv, confinement)
    return pid


def _put_down(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _await_exec(report: int) -> None:
    """Read the child's report, which ends when exec closes the other end."""
    with _failing_as(Stage.FORK):
        text = b"".join(iter(lambda: os.read(report, _REPORT_BYTES), b""))
    if text == _CONFINED:
        return
    if not text.strip(_CONFINED):
        raise NotConfined(Stage.FORK, 0, "the child died on its way into the sandbox")
    stage, error, detail = text.removeprefix(_CONFINED).decode(errors="replace").split(" ", 2)
    raise NotConfined(Stage(stage), int(error), detail)


def _become(ends: _Ends, argv: Sequence[str], confinement: Confinement) -> NoReturn:
    """Go the way into the sandbox, in the child; ends in exec or in a report, and never returns."""
    try:
        for stage, step in _steps(ends, confinement):
            with _failing_as(stage):
                step()
        os.write(ends.report, _CONFINED)
        with _failing_as(Stage.EXEC):
            execveat.execveat(limits.PROGRAM_DESCRIPTOR, argv, ENVIRONMENT)
    except NotConfined as failure:
        _report(ends.report, failure)
    except BaseException as error:  # noqa: BLE001 - whatever it is, this copy of the parent must end
        _report(ends.report, NotConfined(Stage.FORK, 0, repr(error)))
    finally:
        os._exit(_EXIT_NOT_CONFINED)


def _report(descriptor: int, failure: NotConfined) -> None:
    text = f"{failure.stage.value} {failure.errno} {failure.detail}"
    os.write(descriptor, text.encode(errors="replace")[:_REPORT_BYTES])


def _steps(ends: _Ends, confinement: Confinement) -> tuple[tuple[Stage, Callable[[], None]], ...]:
    keep = (Capability.DAC_READ_SEARCH,) if confinement.keep_read_search else ()
    return (
        (Stage.SIGNALS, _reset_signals),
        (Stage.DESCRIPTORS, lambda: _arrange_descriptors(ends)),
        (Stage.IDENTITY, lambda: _assume(confinement.identity, keep)),
        (Stage.CAPABILITIES, lambda: identity.limit_capabilities(keep)),
        (Stage.NO_NEW_PRIVS, prctl.set_no_new_privs),
        (Stage.PARENT, lambda: _die_with(ends.parent)),
        (Stage.LIMITS, lambda: limits.apply(confinement.limits)),
        (Stage.LANDLOCK, lambda: landlock.enforce(ends.ruleset)),
        (Stage.SECCOMP, lambda: seccomp.load(confinement.filter)),
    )


def _reset_signals() -> None:
    # exec resets handlers, but keeps the mask, and what is ignored (Python ignores SIGPIPE).
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _arrange_descriptors(ends: _Ends) -> None:
    close_range.close_all_but((0, 1, 2, *ends.inherit, *ends.descriptors()))
    for number, descriptor in enumerate((ends.null, ends.stdout, ends.stderr)):
        os.dup2(descriptor, number)
    for descriptor in ends.inherit:
        os.set_inheritable(descriptor, True)
    limits.raise_descriptors()
    os.dup2(ends.program, limits.PROGRAM_DESCRIPTOR, inheritable=False)


def _assume(whom: Identity | None, keep: tuple[Capability, ...]) -> None:
    if whom is not None:
        identity.assume(whom, keep=keep)


def _die_with(parent: int) -> None:
    prctl.set_pdeathsig(signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
