"""Clone raw to raw within one file system that shares blocks: nothing is read, nothing is run.

A raw image has no structure, so its copy is the file's. 20 GiB take milliseconds on XFS and btrfs,
where qemu-img reads and writes every block that is not a hole. Nothing is parsed here; what is
written is the same unnamed inode, published in the same way. Where blocks can't be shared, qemu-img
is quicker than copy_file_range(2): docs/decisions/0014.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from typing import TYPE_CHECKING

from convertd_core import conditions, results, validation, values
from convertd_daemon.job import stages
from convertd_daemon.job.files import paths, source_change
from convertd_daemon.linux import ficlone

if TYPE_CHECKING:
    from convertd_daemon.job.endpoints import Endpoints


def choose(
    grant: values.ConvertGrant, plan: stages.ConversionPlan, ends: Endpoints
) -> stages.ConversionPlan:
    """Decide by which method the result gets its data, and say so in the plan.

    With the method REFLINK, the destination has all of its data when this returns: only trying
    tells for certain that blocks can be shared. Otherwise nothing was written to it.

    Raises:
        conditions.ReflinkNotPossible: the request allows no other method.
        conditions.NoSpace, conditions.QuotaExceeded: as that, and it was for want of space.
        conditions.SourceChanged: the source was written to since it was opened.
        conditions.ImageInUse: a running qemu writes the source.
    """
    try:
        _check_possible(grant, plan, ends)
        _clone(plan, ends)
    except (conditions.ReflinkNotPossible, conditions.NoSpace, conditions.QuotaExceeded) as error:
        if grant.request.reflink is values.Reflink.ALWAYS:
            raise
        reason = "there is no space to share blocks: it takes metadata"
        if isinstance(error, conditions.ReflinkNotPossible):
            reason = error.problem
        return dataclasses.replace(plan, method=results.Method.QEMU_IMG, method_reason=reason)
    source_change.check(ends.sources)
    for source in ends.sources:
        # qemu-img would refuse it: what a guest has not flushed yet is missing in it.
        if paths.is_being_written(source.fd):
            raise conditions.ImageInUse(path=source.place.path)
    return dataclasses.replace(
        plan,
        method=results.Method.REFLINK,
        method_reason="source and destination are in a file system that shares blocks",
        needed_bytes=0,
    )


def _check_possible(
    grant: values.ConvertGrant, plan: stages.ConversionPlan, ends: Endpoints
) -> None:
    """Find out whether blocks may be shared, and would give what was asked for.

    Raises:
        conditions.ReflinkNotPossible: no.
    """
    request = grant.request
    if request.reflink is values.Reflink.NEVER:
        raise _refusal(ends.dest.place, "the request asks for a copy")
    if obstacle := validation.reflink_obstacle(request):
        raise _refusal(ends.dest.place, f"not possible with {obstacle}")
    places = (*(source.place for source in ends.sources), ends.dest.place)
    for place in places:
        if place.root.kind is values.RootKind.BLOCK:
            raise _refusal(place, "a block device has no blocks to share")
        if not place.root.reflink:
            raise _refusal(place, f"the policy does not allow it in the root {place.root.name}")
    if len(ends.chain) != 1 or not plan.source.format == plan.dest_format == "raw":
        raise _refusal(ends.source.place, "only raw images share blocks, with raw results")


def _clone(plan: stages.ConversionPlan, ends: Endpoints) -> None:
    """Share the source's blocks. The destination is empty if that fails.

    XFS also answers ENOSPC where a copy still has room. Source: Linux xfs_reflink.c,
    xfs_reflink_ag_has_free_space().

    Raises:
        conditions.ReflinkNotPossible: it can't.
        conditions.NoSpace, conditions.QuotaExceeded: it has no space for the metadata.
    """
    try:
        ficlone.ficlone(ends.dest.fd, ends.source.fd)
    except OSError as error:
        os.ftruncate(ends.dest.fd, 0)
        if error.errno == errno.ENOSPC:
            raise ends.dest.no_space(0) from error
        if error.errno == errno.EDQUOT:
            raise conditions.QuotaExceeded(path=ends.dest.place.path) from error
        raise _refusal(ends.dest.place, _problem_of(error)) from error
    # qemu rounds a raw image up to whole sectors.
    os.ftruncate(ends.dest.fd, plan.source.virtual_size_bytes)


def _problem_of(error: OSError) -> str:
    if error.errno == errno.EXDEV:
        return "source and destination are in different file systems"
    if error.errno in {errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS}:
        return "the file system does not share blocks"
    return f"the file system can't share these files' blocks: {os.strerror(error.errno or 0)}"


def _refusal(place: values.Place, problem: str) -> conditions.ReflinkNotPossible:
    return conditions.ReflinkNotPossible(path=place.path, problem=problem)
