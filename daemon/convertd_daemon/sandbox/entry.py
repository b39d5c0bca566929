"""A forked child's way into the sandbox, to become a program there. Fails closed.

The child gives up its rights in an order that the kernel forces:

    parent                  PDEATHSIG, unless the parent has died already
    signals, descriptors    nothing of the parent's reaches the program
    identity, capabilities  setresuid(2) empties sets and disarms PDEATHSIG, so it goes first
    no_new_privs            Landlock and seccomp demand it
    parent                  PDEATHSIG, after the last change of identity
    limits                  need setrlimit(2), for the process itself
    landlock, seccomp       last: the filter refuses much of the above
    exec                    the opened program itself, through the filter's one gap

It reports a step that fails, and exits.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from convertd_daemon.linux import execveat, prctl
from convertd_daemon.linux.capabilities import Capability
from convertd_daemon.sandbox import (
    forking,
    identity,
    landlock,
    limits,
    seccomp,
)
from convertd_daemon.sandbox.errors import NotConfined, Stage
from convertd_daemon.sandbox.identity import Identity
from convertd_daemon.sandbox.limits import Limits

ENVIRONMENT: Final[Mapping[str, str]] = {
    "LC_ALL": "C",
    # Else up to 66 threads take 1.2 GiB of address space; no slower with one arena.
    "MALLOC_ARENA_MAX": "1",
    "PATH": "/usr/bin:/bin",
}

FIRST_FREE: Final = 3
"""The first descriptor that is none of the standard three."""

CONFINED: Final = b"."
"""The last report before exec, which closes the pipe."""

REPORT_BYTES: Final = 4096

_NAME: Final = "convertd-child"  # until exec, which gives it the program's
_EXIT_NOT_CONFINED: Final = 127


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What a child becomes, and with what. It has these descriptors and no others.

    `parent` is the process that forks it; `compiled` is the seccomp filter; `report` is a pipe's
    end for writing; `inherit` are the descriptors that the program keeps, at their numbers.
    """

    parent: int
    argv: Sequence[str]
    identity: Identity | None
    keep: tuple[Capability, ...]
    limits: Limits
    compiled: bytes
    program: int
    ruleset: int
    stdout: int
    stderr: int
    report: int
    inherit: tuple[int, ...]

    def own(self) -> tuple[int, ...]:
        """The descriptors that the child needs, and the program has by no such number."""
        return (self.program, self.ruleset, self.stdout, self.stderr, self.report)


@contextlib.contextmanager
def failing_as(stage: Stage) -> Iterator[None]:
    """Have what fails in this block be NotConfined, at this stage."""
    try:
        yield
    except OSError as error:
        raise NotConfined(stage, error.errno or 0, str(error)) from error
    except ValueError as error:
        raise NotConfined(stage, 0, str(error)) from error


def enter(asked: Entry) -> NoReturn:
    """In the child: enter the sandbox; ends in exec or in a report, and never returns."""
    try:
        for stage, step in _steps(asked):
            with failing_as(stage):
                step()
        os.write(asked.report, CONFINED)
        with failing_as(Stage.EXEC):
            execveat.execveat(limits.PROGRAM_DESCRIPTOR, asked.argv, ENVIRONMENT)
    except NotConfined as failure:
        _report(asked.report, failure)
    except BaseException as error:  # noqa: BLE001 - whatever it is, this copy of the parent must exit
        _report(asked.report, NotConfined(Stage.FORK, 0, repr(error)))
    finally:
        os._exit(_EXIT_NOT_CONFINED)


def _report(pipe: int, failure: NotConfined) -> None:
    text = f"{failure.stage.value} {failure.errno} {failure.detail}"
    os.write(pipe, text.encode(errors="replace")[:REPORT_BYTES])


def _steps(asked: Entry) -> tuple[tuple[Stage, Callable[[], None]], ...]:
    return (
        (Stage.PARENT, lambda: forking.die_with(asked.parent)),
        (Stage.SIGNALS, _reset_signals),
        (Stage.DESCRIPTORS, lambda: _arrange_descriptors(asked)),
        (Stage.IDENTITY, lambda: _assume(asked.identity, asked.keep)),
        (Stage.CAPABILITIES, lambda: identity.limit_capabilities(asked.keep)),
        (Stage.NO_NEW_PRIVS, prctl.set_no_new_privs),
        (Stage.PARENT, lambda: forking.die_with(asked.parent)),
        (Stage.LIMITS, lambda: limits.apply(asked.limits)),
        (Stage.LANDLOCK, lambda: landlock.enforce(asked.ruleset)),
        (Stage.SECCOMP, lambda: seccomp.load(asked.compiled)),
    )


def _arrange_descriptors(asked: Entry) -> None:
    """Give each descriptor its number in the program; the others are closed by exec."""
    prctl.set_name(_NAME)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for number, descriptor in enumerate((null, asked.stdout, asked.stderr)):
        os.dup2(descriptor, number)
    for descriptor in asked.inherit:
        os.set_inheritable(descriptor, True)
    limits.raise_descriptors()
    os.dup2(asked.program, limits.PROGRAM_DESCRIPTOR, inheritable=False)


def _reset_signals() -> None:
    # exec resets handlers, but keeps the mask, and what is ignored (Python ignores SIGPIPE).
    signal.set_wakeup_fd(-1)
    for number in forking.ALL_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _assume(user: Identity | None, keep: tuple[Capability, ...]) -> None:
    if user is not None:
        identity.assume(user, keep=keep)
