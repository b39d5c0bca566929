"""How a job begins and ends: forked from the broker, or as a program of its own.

As a program (`python -m convertd_daemon.job`) it reads one message, its order, from the channel on
standard input, and answers there with the same events: that is how somebody converts with nobody's
rights but his own, without a daemon.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Protocol

from convertd_daemon import channel, errors, model
from convertd_daemon.job import account, leash, own, pipeline, qemu_img, rights, secrets
from convertd_daemon.kernel import close_range, getrandom, prctl
from convertd_daemon.sandbox import limits, seccomp
from convertd_daemon.sandbox.gate import Gate
from convertd_daemon.sandbox.setup import Setup

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)


class Empty(Protocol):
    """How a forked job tells that it holds nothing but its own: see broker/emptied.py."""

    parent: int
    writer: int

    def tell(self) -> None:
        """Tell it, once; closes `writer`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A job and its grant, for a process that is forked with it."""

    job_id: str
    grant: model.Grant | model.InspectGrant


def forked(
    begun: Begun | None,
    orders: channel.Channel,
    line: account.Witness,
    setup: Setup,
    empty: Empty,
) -> NoReturn:
    """Be a job, in the child that the broker just forked; first wait for it, unless it is given.

    Never returns. fork(2) gives a child all its parent has, close-on-exec or not; so the first act
    is to close what belongs to the broker and to other jobs, and to tell the broker, which waits
    for that. All signals are blocked until ours are set.
    """
    try:
        close_range.close_all_but({0, 1, 2, orders.fileno(), *line.descriptors(), empty.writer})
        empty.tell()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        leash.end_on_sigterm()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        rights.die_with(empty.parent)
        os.umask(0o077)
        job, gate = (begun, None) if begun else _wait(orders, setup)
        orders.close()
        prctl.set_name("convertd-job")
        _work(lambda: job.grant, line, setup, gate)
    except leash.Cut:
        log.info("job cut short at its very end")
    except channel.Closed:
        log.debug("no job came pid=%d", os.getpid())
    except BaseException:
        log.exception("job failed before its work")
    finally:
        # Whatever happens, and SIGTERM may happen here too: a job must never return into the
        # broker's code.
        try:
            leash.outlive_sigterm()
            line.give(done=False)
            logging.shutdown()
        finally:
            os._exit(0)


def _wait(orders: channel.Channel, setup: Setup) -> tuple[Begun, Gate]:
    """Wait for the one order, at the gate with a process that will be its first qemu-img.

    Raises:
        channel.Closed: there will be none.
        leash.Cut: SIGTERM came first.
    """
    prctl.set_name("convertd-spare")
    gate = Gate(setup.seccomp)
    # What can't be forked now is forked when it is needed, or says why not.
    with contextlib.suppress(OSError):
        gate.fork()
    try:
        begin, _ = orders.receive(channel.Begin)
    except BaseException:
        gate.close()
        raise
    return Begun(job_id=begin.job_id, grant=begin.grant), gate


def main() -> int:
    """Be the job as a program of its own, with the caller's own rights."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    line = channel.Channel(socket.socket(fileno=os.dup(0)))
    os.umask(0o077)
    limits.refuse_core_dumps()
    order, _ = line.receive(channel.Order)
    setup = Setup(
        path=order.qemu_img, identity=None, seccomp=seccomp.compile_profile(seccomp.QEMU_IMG)
    )
    _work(lambda: own.grant(order), line, setup)
    return 0


def _work(
    asked: Callable[[], model.Grant | model.InspectGrant],
    line: channel.Channel,
    setup: Setup,
    gate: Gate | None = None,
) -> None:
    """Do what is granted, and say how it ended, unless somebody cut it short and knows.

    `gate` is the one that was made ahead.
    """
    leash.end_on_sigterm()
    try:
        grant = asked()
        with qemu_img.opened(setup, gate or Gate(setup.seccomp)) as worker:
            if isinstance(grant, model.Grant):
                tether = leash.Leash(line, grant.limits.duration_s)
                kept = _secrets_of(grant.request, line)
                pipeline.convert(grant, kept, qemu_img.Runner(worker, tether))
            else:
                tether = leash.Leash(line, grant.limits.inspect_s)
                pipeline.inspect(grant, qemu_img.Runner(worker, tether))
    except leash.Cut:
        log.info("job cut short")
    except errors.ConvertError as error:
        _say_failed(line, error.failure())
    except Exception:
        error_id = getrandom.hex_name(6)
        log.exception("internal error id=%s", error_id)
        _say_failed(line, errors.InternalError(error_id=error_id).failure())


def _secrets_of(request: model.ConvertRequest, line: channel.Channel) -> secrets.Secrets:
    try:
        return secrets.take(
            line, source=request.source.encrypted, dest=request.dest.encryption is not None
        )
    except channel.Closed as error:
        raise leash.Cut from error


def _say_failed(line: channel.Channel, failure: errors.Failure) -> None:
    try:
        line.send(channel.Failed(failure=failure))
    except channel.Closed:
        log.info("nobody heard reason=%s message=%r", failure.reason, failure.message)
