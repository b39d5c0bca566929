"""Run qemu-img in the sandbox, and read its output until it ends.

Fails closed: `sandbox.spawn.spawn` either confines the program or does not start it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import select
import shlex
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from convertd_core import conditions
from convertd_daemon.job.files import credentials
from convertd_daemon.sandbox import runtime, spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from convertd_daemon.job.context import JobContext
    from convertd_daemon.sandbox import limits
    from convertd_daemon.sandbox.setup import Setup

log = logging.getLogger(__name__)

MAX_OUTPUT_BYTES: Final = 1024 * 1024
"""What is kept of each of qemu-img's outputs. The rest is read and dropped."""

MAX_LOGGED_CHARACTERS: Final = 2000

TICK_S: Final = 1.0
"""How often a program without output is checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A set-up with the program opened: one and the same through a job, whatever is upgraded."""

    setup: Setup
    program: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How qemu-img ended. `status` is as waitstatus_to_exitcode gives it: negative for a signal."""

    status: int
    stdout: bytes
    stderr: str

    @property
    def excerpt(self) -> str:
        """Its standard error, cut to the length of a log line.

        The whole length depends on the image.
        """
        if len(self.stderr) <= MAX_LOGGED_CHARACTERS:
            return self.stderr
        half = MAX_LOGGED_CHARACTERS // 2
        return f"{self.stderr[:half]} … {self.stderr[-half:]}"


@contextlib.contextmanager
def opened(setup: Setup) -> Iterator[Program]:
    """Open the program for the length of a job.

    Raises:
        conditions.Unsupported: there is none, or it is a script, which can't be confined to itself.
    """
    with contextlib.ExitStack() as stack:
        try:
            program = os.open(setup.path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, program)
            runtime.interpreter(program)
        except (OSError, ValueError) as error:
            problem = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
            raise conditions.Unsupported(
                what="conversion", why=f"{setup.path}: {problem}"
            ) from error
        yield Program(setup=setup, program=program)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inodes:
    """The descriptors whose inodes exist for a run of qemu-img; it has no others.

    `devices` are written, `pipes` read; `groups` are added to the worker's own, for a device.
    """

    read: tuple[int, ...] = ()
    write: tuple[int, ...] = ()
    devices: tuple[int, ...] = ()
    pipes: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()


class Listener(Protocol):
    """Follows a run of qemu-img while it lasts."""

    def on_output(self, data: bytes) -> None:
        """Take a piece of its standard output."""

    def on_error_output(self, data: bytes) -> None:
        """Take a piece of its standard error."""

    def on_tick(self, child: spawn.ConfinedProgram) -> None:
        """Check it, about once a second; raising ends the run."""


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs qemu-img for one job: with its program and its context.

    `on_tick`, if there is one, is called as a program of `run` has begun, and then about once a
    second; raising ends the run. It must not block.
    """

    worker: Program
    context: JobContext
    on_tick: Callable[[], None] | None = None

    def run(
        self,
        argv: tuple[str, ...],
        inodes: Inodes,
        bounds: limits.Limits,
        listener: Listener | None = None,
    ) -> Outcome:
        """Run qemu-img to its end. However this is left, the program is gone.

        Raises:
            Cancelled: the result is no longer wanted.
            conditions.DurationExceeded: see JobContext.check.
        """
        with self.started(argv, inodes, bounds, listener) as running:
            return running.wait_until_done(self.on_tick)

    @contextlib.contextmanager
    def started(
        self,
        argv: tuple[str, ...],
        inodes: Inodes,
        bounds: limits.Limits,
        listener: Listener | None = None,
    ) -> Iterator[RunningProgram]:
        """Have qemu-img run for the length of the block; afterwards the program is gone."""
        log.debug("run command=%s", shlex.join(argv))
        identity = self.worker.setup.identity
        if identity is not None:
            identity = dataclasses.replace(identity, groups=inodes.groups)
        confinement = spawn.Confinement(
            identity=identity,
            keep_read_search=any(_is_closed_to(identity, fd) for fd in inodes.read),
            read=inodes.read,
            write=inodes.write,
            devices=inodes.devices,
            limits=bounds,
            filter=self.worker.setup.seccomp,
        )
        inherit = (*inodes.read, *inodes.write, *inodes.devices, *inodes.pipes)
        with spawn.spawn(
            self.worker.program, argv, confinement=confinement, inherit=inherit
        ) as child:
            try:
                yield RunningProgram(child, self.context, listener)
            except (conditions.Stalled, conditions.DurationExceeded) as error:
                # While storage does not answer, a program can't be killed, and leaving this block
                # waits for its end: so the failure is sent first.
                self.context.send_failure(error)
                raise


def _is_closed_to(identity: spawn.Identity | None, fd: int) -> bool:
    """Whether the worker needs CAP_DAC_READ_SEARCH for an inode. Tried with the worker's ids."""
    return identity is not None and not credentials.can_read(identity, fd)


class RunningProgram:
    """One program's outputs, its end, and the reasons to end it, in one poll loop."""

    def __init__(
        self,
        child: spawn.ConfinedProgram,
        context: JobContext,
        listener: Listener | None,
    ) -> None:
        self.child = child
        self.context = context
        self.listener = listener
        self.outputs = {child.stdout: bytearray(), child.stderr: bytearray()}
        self.open_outputs = set(self.outputs)
        self.poll = select.poll()
        for fd in self.outputs:
            self.poll.register(fd, select.POLLIN)
        # POLLHUP comes unasked: the channel's other end is gone.
        self.poll.register(context.channel.fileno(), 0)

    def wait_until_done(self, on_tick: Callable[[], None] | None = None) -> Outcome:
        """Read until both outputs are closed, then take the exit status. See Runner.on_tick."""
        if on_tick:
            on_tick()
        looked = time.monotonic()
        while self.read_outputs(TICK_S):
            self.context.check()
            if time.monotonic() - looked >= TICK_S:
                looked = time.monotonic()
                self._tick(on_tick)
        return Outcome(
            status=self._status(on_tick),
            stdout=bytes(self.outputs[self.child.stdout]),
            stderr=self.outputs[self.child.stderr].decode("utf-8", "replace").strip(),
        )

    def read_outputs(self, wait_s: float) -> bool:
        """Take what the outputs have or get in this time; False once both are closed."""
        if self.open_outputs:
            for fd, _ in self.poll.poll(wait_s * 1000):
                if fd in self.open_outputs and not self._read_output(fd):
                    self.poll.unregister(fd)
                    self.open_outputs.remove(fd)
        return bool(self.open_outputs)

    def _read_output(self, fd: int) -> bool:
        """Take what an output has; False at its end."""
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return True
        kept = self.outputs[fd]
        kept += data[: MAX_OUTPUT_BYTES - len(kept)]
        if self.listener and data:
            is_output = fd == self.child.stdout
            (self.listener.on_output if is_output else self.listener.on_error_output)(data)
        return bool(data)

    def _tick(self, on_tick: Callable[[], None] | None) -> None:
        if self.listener:
            self.listener.on_tick(self.child)
        if on_tick:
            on_tick()

    def _status(self, on_tick: Callable[[], None] | None) -> int:
        """Wait for the end of a program that has closed its outputs, as wait_until_done does."""
        ended = select.poll()
        ended.register(self.child.pidfd, select.POLLIN)
        ended.register(self.context.channel.fileno(), 0)
        while not any(fd == self.child.pidfd for fd, _ in ended.poll(TICK_S * 1000)):
            self.context.check()
            self._tick(on_tick)
        return self.child.wait()
