"""How a job begins and ends: forked from the broker, or as a program of its own.

As a program (`python -m convertd_daemon.job`) it reads one LocalRequest from the channel on
standard input, and answers there with the same events: so a user converts with the user's own
rights, and without a daemon.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from typing import TYPE_CHECKING

from convertd_core import conditions, messages, values
from convertd_daemon import channel
from convertd_daemon.job import (
    context,
    local_grant,
    outcome,
    pipeline,
    secrets,
)
from convertd_daemon.job.qemu import execution
from convertd_daemon.linux import getrandom, prctl
from convertd_daemon.sandbox import forking, limits, seccomp
from convertd_daemon.sandbox.setup import Setup

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)


def run_forked(
    assigned: messages.StartJob | None,
    assignments: channel.Channel,
    job_channel: outcome.OutcomeReporter,
    setup: Setup,
    broker: int,
) -> None:
    """Run a job in the child that the broker just forked; wait for an assignment if there is none.

    `broker` is the broker's pid. See forking.fork.
    """
    try:
        context.cancel_on_sigterm()
        forking.unblock_signals()
        forking.die_with(broker)
        os.umask(0o077)
        job = assigned or _wait_for_assignment(assignments)
        assignments.close()
        prctl.set_name("convertd-job")
        _work(lambda: job.grant, job_channel, setup)
    except context.Cancelled:
        log.info("job cancelled at its end")
    except channel.Closed:
        log.debug("idle job process ends pid=%d", os.getpid())
    finally:
        # SIGTERM may come here too, and as it is about to be ignored.
        ignored = False
        while not ignored:
            try:
                context.ignore_sigterm()
                ignored = True
            except context.Cancelled:
                log.debug("job cancelled at its very end")
        job_channel.report(done=False)
        logging.shutdown()


def _wait_for_assignment(assignments: channel.Channel) -> messages.StartJob:
    """Wait for a job.

    Raises:
        channel.Closed: there will be none.
        context.Cancelled: SIGTERM came first.
    """
    prctl.set_name("convertd-idle")
    start: messages.StartJob
    start, _ = assignments.receive(messages.StartJob)
    return start


def main() -> int:
    """Run the job as a program of its own, with the caller's own rights."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    job_channel = channel.Channel(socket.socket(fileno=os.dup(0)))
    os.umask(0o077)
    limits.refuse_core_dumps()
    request, _ = job_channel.receive(messages.LocalRequest)
    setup = Setup(
        path=request.qemu_img, identity=None, seccomp=seccomp.compile_profile(seccomp.QEMU_IMG)
    )
    _work(lambda: local_grant.grant(request), job_channel, setup)
    return 0


def _work(
    asked: Callable[[], values.Grant],
    job_channel: channel.Channel,
    setup: Setup,
) -> None:
    """Do what is granted, and send how it ended, unless it was cancelled."""
    context.cancel_on_sigterm()
    try:
        grant = asked()
        with execution.opened(setup) as worker:
            if isinstance(grant, values.ConvertGrant):
                job_context = context.JobContext(job_channel, grant.limits.duration_seconds)
                passphrases = _secrets_of(grant.request, job_channel)
                pipeline.convert(grant, passphrases, execution.Runner(worker, job_context))
            else:
                job_context = context.JobContext(job_channel, grant.limits.inspect_seconds)
                pipeline.inspect(grant, execution.Runner(worker, job_context))
    except context.Cancelled:
        log.info("job cancelled")
    except conditions.ConvertError as error:
        _send_failure(job_channel, error.failure())
    except Exception:
        error_id = getrandom.hex_name(6)
        log.exception("internal error id=%s", error_id)
        _send_failure(job_channel, conditions.InternalError(error_id=error_id).failure())


def _secrets_of(request: values.ConvertRequest, job_channel: channel.Channel) -> secrets.Secrets:
    try:
        return secrets.take(
            job_channel,
            source=request.source.encryption is not None,
            dest=request.dest.encryption is not None,
        )
    except channel.Closed as error:
        raise context.Cancelled from error


def _send_failure(job_channel: channel.Channel, failure: conditions.Failure) -> None:
    try:
        job_channel.send(messages.Failed(failure=failure))
    except channel.Closed:
        log.info(
            "the caller is gone, failure not sent reason=%s message=%r",
            failure.reason,
            failure.message,
        )
