"""The steps of one job, from a grant to a published image. Read this page first.

Each step takes the results of the earlier ones, so that none can be left out. However the function
is left, everything opened is closed, and everything unpublished is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os

from convertd_core import messages, results, values
from convertd_daemon.job import (
    confinement,
    context,
    endpoints,
    progress,
    secrets,
    small_copy,
    stages,
)
from convertd_daemon.job.files import (
    paths,
    source_change,
)
from convertd_daemon.job.qemu import (
    backing_chain,
    conversion,
    execution,
    integrity,
    plan,
    verification,
)
from convertd_daemon.job.reflink import sharing


def convert(
    grant: values.ConvertGrant, passphrases: secrets.Secrets, runner: execution.Runner
) -> None:
    """Convert one image, and send progress and outcome on the job's channel."""
    context_, request = runner.context, grant.request
    context_.progress(values.Phase.PREPARING)
    with contextlib.ExitStack() as stack:
        # 1. Open: names become descriptors, and Landlock closes the rest of the file system.
        source = stack.enter_context(paths.open_source(grant.source, grant.peer))
        dest = stack.enter_context(endpoints.open_dest(grant, runner.worker.setup))
        confinement.to_roots(grant, source, dest, runner.worker)
        # 2. Ask qemu-img what the source is, and follow its backing chain.
        links = backing_chain.follow(grant, source, runner, stack)
        backing_chain.check_encryption(grant.request.source, links[0])
        both = endpoints.Endpoints(chain=links, dest=dest)
        confinement.to_inodes(grant, both, runner.worker)
        # 3. Plan: share the blocks of a snapshot, or copy what is small, or run qemu-img.
        planned = plan.make(grant, both.members, both.try_out(request.dest.format))
        prospect = sharing.prepare(grant, both, runner, stack)
        whole = stack.enter_context(
            integrity.IntegrityCheck(grant, prospect.ends, passphrases, runner)
        )
        decision = sharing.choose(grant, planned, both, prospect, whole.runner())
        decision = small_copy.choose(grant, decision)
        both = decision.ends
        whole.examine(both)
        planned = both.after_trial(grant, decision.plan)
        decision = dataclasses.replace(decision, plan=planned)
        dest.check_room(planned, source.fd)
        context_.send(messages.Planned(plan=planned.reported))
        if request.validate_only or dest.on_device:
            # A device is not written before it is known that the source is whole.
            whole.finish()
        if request.validate_only:
            warnings = (*whole.warnings, *dest.expected_warnings)
            context_.send(messages.Succeeded(result=_result(planned, context_, warnings)))
            return
        compare = functools.partial(verification.compare, grant, planned, both, passphrases, runner)
        with endpoints.undefined_on_failure(dest, context_):
            with source_change.watched(both.sources, compare), whole.required():
                # 4. Make the result, and ask meanwhile whether the file holds all of the image.
                context_.progress(values.Phase.CONVERTING)
                shared_bytes, warnings = _make(grant, decision, passphrases, whole.runner())
                # 5. Check.
                after = values.Phase.VERIFYING if request.verify else values.Phase.FLUSHING
                context_.progress(after, progress.ALL)
                verification.check(grant, planned, both, runner)
                if request.verify:
                    compare()
            # 6. Publish.
            context_.progress(values.Phase.PUBLISHING, progress.ALL)
            warnings += dest.flush(planned)
            context_.check()
        with context.defer_sigterm():
            replaced = dest.assign_name(grant)
            result = _result(planned, context_, (*whole.warnings, *warnings))
            result = dataclasses.replace(result, verified=request.verify, replaced=replaced)
            context_.send(messages.Succeeded(result=_published(result, dest.fd, shared_bytes)))


def inspect(grant: values.InspectGrant, runner: execution.Runner) -> None:
    """Send what an image is, and its backing chain as far as the caller may read it."""
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(paths.open_source(grant.source, grant.peer))
        confinement.to_roots(grant, source, None, runner.worker)
        image = backing_chain.describe(grant, source, runner, stack)
        runner.context.send(messages.Inspected(image=image))


def _make(
    grant: values.ConvertGrant,
    decision: sharing.Decision,
    passphrases: secrets.Secrets,
    runner: execution.Runner,
) -> tuple[int, tuple[results.Warning, ...]]:
    """Make the result by the plan's method; gives how many bytes it shares, and warnings."""
    planned, both = decision.plan, decision.ends
    if decision.layout is not None:
        return sharing.carry_out(grant, planned, decision.layout, runner.context), ()
    if planned.method is results.Method.COPY:
        small_copy.copy(grant, planned, both, runner.context)
        return 0, ()
    return 0, conversion.convert(grant, planned, both, passphrases, runner)


def _result(
    planned: stages.ConversionPlan,
    context_: context.JobContext,
    warnings: tuple[results.Warning, ...],
) -> results.ConvertResult:
    """The outcome, as far as it is known before anything is published."""
    return results.ConvertResult(
        published=False,
        source_format=planned.source_format,
        dest_format=planned.dest_format,
        virtual_size_bytes=planned.virtual_size_bytes,
        allocated_size_bytes=0,
        dest_cache=planned.dest_cache,
        source_cache=planned.source_cache,
        warnings=(*planned.warnings, *warnings),
        elapsed_seconds=context_.seconds,
        bytes_per_second=0.0,
        verified=False,
        replaced=False,
        method=planned.method,
        shared_bytes=0,
        written_bytes=0,
    )


def _published(result: results.ConvertResult, fd: int, shared_bytes: int) -> results.ConvertResult:
    """The outcome with what a published file takes. `shared_bytes` were put in by reference."""
    allocated_bytes = os.fstat(fd).st_blocks * 512
    shared_bytes = min(shared_bytes, allocated_bytes)
    return dataclasses.replace(
        result,
        published=True,
        bytes_per_second=result.virtual_size_bytes / result.elapsed_seconds,
        allocated_size_bytes=allocated_bytes,
        shared_bytes=shared_bytes,
        written_bytes=allocated_bytes - shared_bytes,
    )
