"""Have a result share the blocks of its source, if that is possible. Read this page first.

Data is neither read nor written: only the tables that say where it lies. In steps:

1. Is it asked for, and allowed, and of formats that can be written here? That costs nothing: see
   eligibility.
2. A snapshot of the chain, which is also the trial whether the file system can: see snapshot.
3. A map of it, from qemu-img in the sandbox: see mapping. What can't be shared ends it.
4. The result: stretches of a raw file, or of a qcow2 around them: see placing and qcow2_writer.

Up to the third step nothing is written to the destination, and qemu-img can convert as well.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from convertd_core import conditions, results, values
from convertd_daemon.job import stages
from convertd_daemon.job.endpoints import Endpoints
from convertd_daemon.job.files import publish
from convertd_daemon.job.reflink import eligibility, mapping, placing, qcow2_writer, snapshot
from convertd_daemon.job.reflink.extents import Extent

if TYPE_CHECKING:
    import contextlib

    from convertd_daemon.job import context
    from convertd_daemon.job.qemu import execution

POSSIBLE: Final = "source and destination are in a file system that shares blocks"

REFUSALS: Final = (
    conditions.ReflinkNotPossible,
    *(conditions.NoSpace, conditions.QuotaExceeded),
)

NO_ROOM: Final = "there is no space for the metadata of shared blocks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prospect:
    """Whether blocks may be shared, as far as can be told before the images are looked into.

    `ends` are what is to be read: the snapshot's, or what was opened if `problem` says why not.
    """

    ends: Endpoints
    snapshot: snapshot.Snapshot | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where all the data of a disk is, in the files of a snapshot; `data_bytes` in all."""

    snapshot: snapshot.Snapshot
    extents: Iterable[Extent]
    data_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The method by which the result gets its data, in the plan, and what is read for it.

    `layout` is what there is to share, with the method REFLINK alone.
    """

    plan: stages.ConversionPlan
    ends: Endpoints
    layout: Layout | None = None


def prepare(
    grant: values.ConvertGrant,
    opened: Endpoints,
    runner: execution.Runner,
    stack: contextlib.ExitStack,
) -> Prospect:
    """Take the snapshot, if there can be one. `stack` closes it.

    Raises:
        conditions.ReflinkNotPossible: there can't, and the request allows nothing else.
        conditions.NoSpace, conditions.QuotaExceeded: as that, and it was for want of space.
        conditions.SourceChanged, conditions.ImageInUse: as snapshot.take says.
    """
    reader = runner.worker.setup.identity
    try:
        dest = eligibility.check(grant, opened)
        taken = snapshot.take(grant, opened, dest, reader, stack)
    except REFUSALS as refusal:
        return Prospect(ends=opened, problem=_problem(grant, refusal))
    return Prospect(ends=taken.ends, snapshot=taken)


def choose(
    grant: values.ConvertGrant,
    planned: stages.ConversionPlan,
    opened: Endpoints,
    prospect: Prospect,
    runner: execution.Runner,
) -> Decision:
    """Decide by which method the result gets its data.

    Raises:
        conditions.ReflinkNotPossible: not by sharing, and the request allows nothing else.
        conditions.NoSpace, conditions.QuotaExceeded: as that, and it was for want of space.
        conditions.Stalled, conditions.DurationExceeded, …: as in a conversion.
    """
    problem = prospect.problem
    if prospect.snapshot is not None:
        try:
            layout = _layout(grant, prospect.snapshot, runner)
        except REFUSALS as refusal:
            problem = _problem(grant, refusal)
        else:
            method = results.Method.REFLINK
            plan = dataclasses.replace(
                planned, method=method, method_reason=POSSIBLE, needed_bytes=0
            )
            return Decision(plan=plan, ends=prospect.ends, layout=layout)
    method = results.Method.QEMU_IMG
    plan = dataclasses.replace(planned, method=method, method_reason=problem)
    return Decision(plan=plan, ends=opened)


def carry_out(
    grant: values.ConvertGrant,
    plan: stages.ConversionPlan,
    layout: Layout,
    job: context.JobContext,
) -> int:
    """Write the result around the blocks that it shares; gives how many bytes it shares.

    Raises:
        Cancelled, conditions.DurationExceeded: see JobContext.check.
        conditions.NoSpace, conditions.QuotaExceeded, conditions.WriteFailed: there is no room for
            the metadata, or the file system failed.
    """
    dest, size = layout.snapshot.dest, plan.virtual_size_bytes
    placer = placing.Placer(layout.snapshot, layout.data_bytes, job)
    with publish.write_errors(dest):
        if plan.dest_format == "raw":
            os.ftruncate(dest.fd, size)
            for extent in layout.extents:
                placer.place_at_start(extent)
        else:
            created = qcow2_writer.creation(grant.request.dest)
            qcow2_writer.write(dest.fd, size, created, layout.extents, placer.place)
    return placer.shared_bytes


def _layout(
    grant: values.ConvertGrant, taken: snapshot.Snapshot, runner: execution.Runner
) -> Layout:
    ends = taken.ends
    if [link.info.format for link in ends.chain] == ["raw"]:
        # Its file is the disk: the kernel knows the holes, and there is nothing to be asked.
        source = ends.source
        return Layout(
            snapshot=taken, extents=mapping.of_file(source), data_bytes=source.allocated_bytes
        )
    with publish.write_errors(taken.dest):
        extents, data_bytes = mapping.of_chain(grant, taken, runner)
    return Layout(snapshot=taken, extents=extents, data_bytes=data_bytes)


def _problem(grant: values.ConvertGrant, refusal: conditions.ConvertError) -> str:
    """Why blocks can't be shared, if the request allows another way.

    Raises:
        conditions.ConvertError: this refusal, if it does not.
    """
    if grant.request.reflink is values.Reflink.ALWAYS:
        raise refusal
    return refusal.problem if isinstance(refusal, conditions.ReflinkNotPossible) else NO_ROOM
