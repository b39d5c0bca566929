"""Check the result: exit status 0 of qemu-img is not enough."""

from __future__ import annotations

import logging
import mmap
import os
from typing import TYPE_CHECKING, Final

from convertd_core import conditions, results, values
from convertd_daemon.job import secrets, stages
from convertd_daemon.job.qemu import conversion, execution, image_info
from convertd_daemon.job.qemu import plan as plans
from convertd_daemon.sandbox import limits

if TYPE_CHECKING:
    from convertd_daemon.job.endpoints import Endpoints

log = logging.getLogger(__name__)

LONG_S: Final = 2.0
"""After a job this long the result is checked by `qemu-img info`, which takes 10 ms."""

BLOCKS_BYTES: Final = frozenset({4096, mmap.PAGESIZE})
"""Past the page cache, qemu writes whole blocks of the disk, on a tmpfs whole pages. A size is any
number of sectors: the last block then goes on beyond it, with zeroes. Source: qemu block/io.c,
bdrv_pad_request(); MAX_BLOCKSIZE in block/file-posix.c."""


def check(
    grant: values.ConvertGrant,
    plan: stages.ConversionPlan,
    ends: Endpoints,
    runner: execution.Runner,
) -> None:
    """Check size or header of the result, without qemu's padding. A device has neither.

    Raises:
        conditions.VerifyFailed: it can't be the source's image.
        conditions.WriteFailed: the file system has given up meanwhile.
    """
    if ends.dest.on_device:
        return
    size, path = plan.virtual_size_bytes, ends.dest.place.path
    try:
        written = os.fstat(ends.dest.fd).st_size
        padded = {-(-size // block) * block for block in BLOCKS_BYTES}
        if plan.dest_format == "raw" and written in padded - {size}:
            os.ftruncate(ends.dest.fd, size)
            written = size
    except OSError as error:
        raise conditions.WriteFailed(path=path, problem=os.strerror(error.errno or 0)) from error
    if plan.dest_format == "raw":
        if written != size:
            problem = f"has {written} bytes instead of {size}"
            raise conditions.VerifyFailed(path=path, problem=problem)
        return
    if written == 0:
        raise conditions.VerifyFailed(path=path, problem="nothing was written")
    if plan.method is results.Method.REFLINK:
        _check_tables(grant, plan, ends, runner)
    if grant.request.verify or runner.context.seconds > LONG_S:
        found = image_info.result_info(ends.dest.fd, plan.dest_format, runner)
        if found != (plan.dest_format, size):
            problem = f"is {found[0] or 'unreadable'} of {found[1]} bytes, not {size}"
            raise conditions.VerifyFailed(path=path, problem=problem)


def _check_tables(
    grant: values.ConvertGrant,
    plan: stages.ConversionPlan,
    ends: Endpoints,
    runner: execution.Runner,
) -> None:
    """Have qemu-img follow the tables that were written here.

    Raises:
        conditions.VerifyFailed: they are not in order.
    """
    argv = plans.check_argv(ends.dest_node(plan.dest_format))
    inodes = execution.Inodes(read=(ends.dest.fd,))
    bounds = limits.Limits(address_space_bytes=grant.limits.memory_bytes)
    observer = conversion.Observer(runner.context, ends.dest.fd, grant.limits.stall_seconds)
    outcome = runner.run(argv, inodes, bounds, observer)
    if outcome.status != 0:
        path = ends.dest.place.path
        log.error("result damaged path=%r stderr=%r", path, outcome.excerpt)
        problem = "its tables are not in order, as qemu-img check tells"
        raise conditions.VerifyFailed(path=path, problem=problem)


def compare(
    grant: values.ConvertGrant,
    plan: stages.ConversionPlan,
    ends: Endpoints,
    kept: secrets.Secrets,
    runner: execution.Runner,
) -> None:
    """Read source and result once more, and compare what a guest would see.

    Raises:
        conditions.VerifyFailed: they differ.
        conditions.ReadFailed: they could not be compared.
    """
    path = ends.dest.place.path
    argv = plans.compare_argv(grant, plan, ends.nodes(), ends.dest_node(plan.dest_format))
    with secrets.as_pipes(kept, runner.worker.setup.identity) as pipes:
        reading = ends.inodes(tuple(pipes.values()))
        outcome = runner.run(plans.with_secrets(argv, pipes), reading, limits.CONVERT)
    if outcome.status == 1:
        raise conditions.VerifyFailed(path=path, problem="the contents are not the same")
    if outcome.status != 0:
        log.warning("compare failed path=%r stderr=%r", path, outcome.excerpt)
        raise conditions.ReadFailed(path=path, problem="it could not be compared")
