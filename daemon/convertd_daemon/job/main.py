"""How a job begins and ends: forked from the broker, or as a program of its own.

As a program (`python -m convertd_daemon.job`) it reads one message, its order, from the channel on
standard input, and answers there with the same events: that is how somebody converts with nobody's
rights but his own, without a daemon.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, NoReturn

from convertd_daemon import channel, errors, model
from convertd_daemon.job import account, leash, own, pipeline, qemu_img, rights, secrets
from convertd_daemon.kernel import close_range, getrandom, prctl
from convertd_daemon.sandbox import limits, seccomp
from convertd_daemon.sandbox.setup import Setup

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)


def forked(
    job_id: str, order: channel.Granted, line: account.Witness, setup: Setup, broker: int
) -> NoReturn:
    """Be the job, in the child that the broker just forked. Never returns.

    fork(2) gives a child all its parent has, close-on-exec or not; so the first act is to close
    what belongs to the broker and to other jobs. All signals are blocked until ours are set.
    """
    try:
        close_range.close_all_but({0, 1, 2, *line.descriptors(), *order.secrets})
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        leash.end_on_sigterm()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        rights.die_with(broker)
        prctl.set_name("convertd-job")
        os.umask(0o077)
        log.debug("job=%s pid=%d", job_id, os.getpid())
        _work(lambda: order, line, setup)
    except leash.Cut:
        log.info("job cut short at its very end")
    except BaseException:
        log.exception("job failed before its work")
    finally:
        # Whatever happens, and SIGTERM may happen here too: a job must never return into the
        # broker's code.
        try:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            line.give(done=False)
            logging.shutdown()
        finally:
            os._exit(0)


def main() -> int:
    """Be the job as a program of its own, with the caller's own rights."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    line = channel.Channel(socket.socket(fileno=os.dup(0)))
    os.umask(0o077)
    limits.refuse_core_dumps()
    order, descriptors = line.receive(channel.Order)
    setup = Setup(
        path=order.qemu_img, identity=None, seccomp=seccomp.compile_profile(seccomp.QEMU_IMG)
    )
    _work(lambda: channel.Granted(own.grant(order), tuple(descriptors)), line, setup)
    return 0


def _work(asked: Callable[[], channel.Granted], line: channel.Channel, setup: Setup) -> None:
    """Do what is granted, and say how it ended, unless somebody cut it short and knows."""
    leash.end_on_sigterm()
    try:
        granted = asked()
        grant = granted.grant
        with qemu_img.opened(setup) as worker:
            if isinstance(grant, model.Grant):
                tether = leash.Leash(line, grant.limits.duration_s)
                kept = _secrets_of(grant.request, granted.secrets)
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


def _secrets_of(request: model.ConvertRequest, pipes: tuple[int, ...]) -> secrets.Secrets:
    return secrets.take(
        pipes, source=request.source.encrypted, dest=request.dest.encryption is not None
    )


def _say_failed(line: channel.Channel, failure: errors.Failure) -> None:
    try:
        line.send(channel.Failed(failure=failure))
    except channel.Closed:
        log.info("nobody heard reason=%s message=%r", failure.reason, failure.message)
