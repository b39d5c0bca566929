"""A preforked child: it enters the sandbox and becomes a program there. Fails closed.

The process that starts the program forks it, perhaps long before there is a program to start. It
holds nothing but its end of a socket, waits for a message, and exits when the other end closes. The
message says what to become, and brings the descriptors. The child then gives up its rights in an
order that the kernel forces:

    parent                  PDEATHSIG, unless the parent has died already
    signals, descriptors    nothing of the parent's reaches the program
    (the message comes)
    identity, capabilities  setresuid(2) empties sets and disarms PDEATHSIG, so it goes first
    no_new_privs            Landlock and seccomp demand it
    parent                  PDEATHSIG, after the last change of identity
    limits                  need setrlimit(2), for the process itself
    landlock, seccomp       last: the filter refuses much of the above
    exec                    the opened program itself, through the filter's one gap

The child reports a step that fails, and exits.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, NoReturn, Self

from convertd_daemon.linux import (
    close_range,
    execveat,
    prctl,
    scm_rights,
)
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

_CONFINED: Final = b"."  # the last message before exec
_REPORT_BYTES: Final = 4096
_NAME: Final = "convertd-child"  # until exec, which gives it the program's
_LAYER: Final = b"layer"
_MOST_BYTES: Final = 256 * 1024  # more than a socket takes in one message
_MOST_DESCRIPTORS: Final = 253  # SCM_MAX_FD: as many as one message can bring
_EXIT_NOT_CONFINED: Final = 127


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramSpec:
    """What to become. `inherit` are the numbers of the descriptors that the program keeps."""

    argv: tuple[str, ...]
    identity: Identity | None
    keep: tuple[int, ...]
    limits: Limits
    inherit: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramDescriptors:
    """The descriptors that go with a ProgramSpec; all borrowed."""

    program: int
    ruleset: int
    stdout: int
    stderr: int
    inherit: tuple[int, ...]

    def all(self) -> tuple[int, ...]:
        """All of them, in the order in which they are sent."""
        return (self.program, self.ruleset, self.stdout, self.stderr, *self.inherit)


class PreforkedChild:
    """The parent's handle of a preforked child.

    Leaving the `with` block kills, reaps and closes. release() gives away pid, pidfd and the
    process. `compiled` is the filter that the child will load.
    """

    __slots__ = ("_socket", "compiled", "pid", "pidfd")

    def __init__(self, *, pid: int, pidfd: int, sock: socket.socket, compiled: bytes) -> None:
        """Take over an unreaped child process and the descriptors that lead to it."""
        self.pid = pid
        self.pidfd = pidfd
        self.compiled = compiled
        self._socket = sock

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        ended = select.poll()
        ended.register(self.pidfd, select.POLLIN)
        return not ended.poll(0)

    def add_landlock_layer(self, ruleset: int) -> None:
        """Have the child enforce a Landlock ruleset at once."""
        self._send(_LAYER, (ruleset,))

    def become(self, spec: ProgramSpec, descriptors: ProgramDescriptors) -> None:
        """Have the child become that program. await_exec tells whether it did.

        Raises:
            OSError: a descriptor is not open, or the spec is too long.
        """
        self._send(json.dumps(dataclasses.asdict(spec)).encode(), descriptors.all())

    def _send(self, data: bytes, descriptors: tuple[int, ...]) -> None:
        # A child that has ended has reported why.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            scm_rights.send(self._socket, data, descriptors)

    def await_exec(self) -> None:
        """Wait until the program has been executed, which closes the socket's other end.

        Raises:
            NotConfined: a step failed.
        """
        with failing_as(Stage.FORK):
            text = b"".join(iter(self._read_report, b""))
        if text == _CONFINED:
            return
        if not text.strip(_CONFINED):
            raise NotConfined(Stage.FORK, 0, "the child died on its way into the sandbox")
        stage, error, detail = text.removeprefix(_CONFINED).decode(errors="replace").split(" ", 2)
        raise NotConfined(Stage(stage), int(error), detail)

    def _read_report(self) -> bytes:
        # If the child exited with unread data, the kernel says so once, before what it wrote.
        with contextlib.suppress(ConnectionResetError):
            return self._socket.recv(_REPORT_BYTES)
        return self._socket.recv(_REPORT_BYTES)

    def release(self) -> tuple[int, int]:
        """Give pid and pidfd away, and close the rest."""
        self._socket.close()
        return self.pid, self.pidfd

    def close(self) -> None:
        """Kill, reap and close."""
        with contextlib.ExitStack() as undo:
            undo.callback(self._socket.close)
            undo.callback(os.close, self.pidfd)
            _kill_and_reap(self.pid)

    def __enter__(self) -> Self:
        """Give the process itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Kill, reap and close, whatever happened in the block."""
        self.close()


def fork(compiled: bytes) -> PreforkedChild:
    """Fork a child that waits for its ProgramSpec; `compiled` is the filter it will load.

    It is killed when the calling process dies, as long as that has CAP_KILL or the same uid.

    Raises:
        OSError: no process, or no descriptor, is to be had; or one of the standard three is closed.
    """
    check_standard_descriptors()
    with contextlib.ExitStack() as stack:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(ours)
        parent = os.getpid()
        with theirs, forking.signals_blocked():
            pid = os.fork()
            if pid == 0:
                _run_child(theirs.fileno(), parent, compiled)
            stack.callback(_kill_and_reap, pid)
            pidfd = os.pidfd_open(pid)
            stack.callback(os.close, pidfd)
        # A signal that was held back is handled by now.
        stack.pop_all()
    return PreforkedChild(pid=pid, pidfd=pidfd, sock=ours, compiled=compiled)


def check_standard_descriptors() -> None:
    """Make sure that no descriptor made now gets one of the numbers that the program's own have.

    Raises:
        OSError: one of them is free.
    """
    for standard in range(FIRST_FREE):
        os.fstat(standard)


def _kill_and_reap(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@contextlib.contextmanager
def failing_as(stage: Stage) -> Iterator[None]:
    """Have what fails in this block be NotConfined, at this stage."""
    try:
        yield
    except OSError as error:
        raise NotConfined(stage, error.errno or 0, str(error)) from error
    except ValueError as error:
        raise NotConfined(stage, 0, str(error)) from error


class _NotNeeded(Exception):
    """The other end is closed: there will be no program."""


Steps = tuple[tuple[Stage, Callable[[], None]], ...]


def _run_child(sock: int, parent: int, compiled: bytes) -> NoReturn:
    """Wait for the spec, then enter the sandbox; ends in exec or in a report, and never returns."""
    try:
        with failing_as(Stage.PARENT):
            forking.die_with(parent)
        with failing_as(Stage.DESCRIPTORS):
            sock = _close_inherited_descriptors(sock)
        with failing_as(Stage.SIGNALS):
            _reset_signals()
        prctl.set_name(_NAME)
        spec, descriptors = _await_spec(sock)
        for stage, step in _steps(spec, descriptors, parent, compiled):
            with failing_as(stage):
                step()
        os.write(sock, _CONFINED)
        with failing_as(Stage.EXEC):
            execveat.execveat(limits.PROGRAM_DESCRIPTOR, spec.argv, ENVIRONMENT)
    except _NotNeeded:
        pass
    except NotConfined as failure:
        _report(sock, failure)
    except BaseException as error:  # noqa: BLE001 - whatever it is, this copy of the parent must exit
        _report(sock, NotConfined(Stage.FORK, 0, repr(error)))
    finally:
        os._exit(_EXIT_NOT_CONFINED)


def _report(sock: int, failure: NotConfined) -> None:
    text = f"{failure.stage.value} {failure.errno} {failure.detail}"
    # Not send(2), which the filter refuses.
    os.write(sock, text.encode(errors="replace")[:_REPORT_BYTES])


def _steps(
    spec: ProgramSpec, descriptors: ProgramDescriptors, parent: int, compiled: bytes
) -> Steps:
    keep = tuple(Capability(number) for number in spec.keep)
    return (
        (Stage.DESCRIPTORS, lambda: _arrange_descriptors(spec.inherit, descriptors)),
        (Stage.IDENTITY, lambda: _assume(spec.identity, keep)),
        (Stage.CAPABILITIES, lambda: identity.limit_capabilities(keep)),
        (Stage.NO_NEW_PRIVS, prctl.set_no_new_privs),
        (Stage.PARENT, lambda: forking.die_with(parent)),
        (Stage.LIMITS, lambda: limits.apply(spec.limits)),
        (Stage.LANDLOCK, lambda: landlock.enforce(descriptors.ruleset)),
        (Stage.SECCOMP, lambda: seccomp.load(compiled)),
    )


def _close_inherited_descriptors(sock: int) -> int:
    """Close all but the socket, which is taken out of the way; give its new number."""
    limits.raise_descriptors()
    moved = _move_above_inherited(sock)
    close_range.close_all_but((*range(FIRST_FREE), moved))
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)
    return moved


def _move_above_inherited(descriptor: int) -> int:
    """A copy above all numbers that a program inherits."""
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, limits.PROGRAM_DESCRIPTOR + 1)


def _reset_signals() -> None:
    # exec resets handlers, but keeps the mask, and what is ignored (Python ignores SIGPIPE).
    signal.set_wakeup_fd(-1)
    for number in forking.ALL_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _await_spec(sock: int) -> tuple[ProgramSpec, ProgramDescriptors]:
    """Wait for the spec; enforce the Landlock rulesets that come before it.

    Raises:
        _NotNeeded: there will be none.
        NotConfined: a layer can't be enforced.
    """
    channel = socket.socket(fileno=sock)
    try:
        while True:
            with failing_as(Stage.DESCRIPTORS):
                data, descriptors = _receive(channel)
            if not data:
                raise _NotNeeded
            if data != _LAYER:
                return _spec_from(data), _descriptors_from(descriptors)
            (ruleset,) = descriptors
            with failing_as(Stage.LANDLOCK):
                landlock.enforce(ruleset)
                os.close(ruleset)
    finally:
        channel.detach()


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    data, descriptors = scm_rights.receive(sock, _MOST_BYTES, _MOST_DESCRIPTORS)
    # They arrive at the lowest free numbers, which the program may have to inherit for others.
    moved = [_move_above_inherited(descriptor) for descriptor in descriptors]
    scm_rights.close_all(descriptors)
    return data, moved


def _spec_from(data: bytes) -> ProgramSpec:
    fields = json.loads(data)
    user = fields["identity"]
    return ProgramSpec(
        argv=tuple(fields["argv"]),
        identity=user and Identity(uid=user["uid"], gid=user["gid"], groups=tuple(user["groups"])),
        keep=tuple(fields["keep"]),
        limits=Limits(**fields["limits"]),
        inherit=tuple(fields["inherit"]),
    )


def _descriptors_from(descriptors: list[int]) -> ProgramDescriptors:
    program, ruleset, stdout, stderr, *inherit = descriptors
    return ProgramDescriptors(
        program=program, ruleset=ruleset, stdout=stdout, stderr=stderr, inherit=tuple(inherit)
    )


def _arrange_descriptors(numbers: tuple[int, ...], descriptors: ProgramDescriptors) -> None:
    """Give each descriptor its number in the program; all others go with exec."""
    os.dup2(descriptors.program, limits.PROGRAM_DESCRIPTOR, inheritable=False)
    for number, descriptor in ((1, descriptors.stdout), (2, descriptors.stderr)):
        os.dup2(descriptor, number)
    for number, descriptor in zip(numbers, descriptors.inherit, strict=True):
        os.dup2(descriptor, number)


def _assume(user: Identity | None, keep: tuple[Capability, ...]) -> None:
    if user is not None:
        identity.assume(user, keep=keep)
