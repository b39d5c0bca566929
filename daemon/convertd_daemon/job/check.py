"""Is the result what it should be? A qemu-img that says 0 is not taken at its word."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final

from convertd_daemon import errors, model
from convertd_daemon.job import plan as plans
from convertd_daemon.job import probe, qemu_img
from convertd_daemon.sandbox import limits

if TYPE_CHECKING:
    from convertd_daemon.job.leash import Leash
    from convertd_daemon.job.paths import Source, Target
    from convertd_daemon.job.result import Result

log = logging.getLogger(__name__)

LONG_S: Final = 2.0
"""A job that took this long can afford to have its result looked at: `info` takes 10 ms."""


def check(
    grant: model.Grant,
    plan: model.Plan,
    target: Target,
    result: Result,
    leash: Leash,
    worker: qemu_img.Worker,
) -> None:
    """Check size or header of the result.

    Raises:
        errors.VerifyFailed: it can't be the source's image.
    """
    size, path = plan.source.virtual_size_bytes, target.place.path
    written = os.fstat(result.fd).st_size
    if plan.dest_format == "raw":
        if written != size:
            problem = f"has {written} bytes instead of {size}"
            raise errors.VerifyFailed(path=path, problem=problem)
        return
    if written == 0:
        raise errors.VerifyFailed(path=path, problem="nothing was written")
    if grant.request.verify or leash.seconds > LONG_S:
        found = probe.result_info(result.fd, plan.dest_format, leash, worker)
        if found != (plan.dest_format, size):
            problem = f"is {found[0] or 'unreadable'} of {found[1]} bytes, not {size}"
            raise errors.VerifyFailed(path=path, problem=problem)


def compare(
    plan: model.Plan,
    source: Source,
    target: Target,
    result: Result,
    leash: Leash,
    worker: qemu_img.Worker,
) -> None:
    """Read source and result once more, and compare what a guest would see.

    Raises:
        errors.VerifyFailed: they differ.
        errors.ReadFailed: they could not be compared.
    """
    argv = plans.compare_argv(plan.source, source.fd, plan, result.fd)
    outcome = qemu_img.run(
        worker, argv, leash, read=(source.fd, result.fd), bounds=limits.CONVERT
    )
    if outcome.status == 1:
        raise errors.VerifyFailed(path=target.place.path, problem="the contents are not the same")
    if outcome.status != 0:
        log.warning("compare failed path=%r said=%r", target.place.path, outcome.stderr)
        raise errors.ReadFailed(path=target.place.path, problem="it could not be compared")
