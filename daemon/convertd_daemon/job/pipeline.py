"""The way of one job, from a grant to a published image. Read this page first.

Each step takes what the earlier ones made, so that none can be left out. Everything opened is
closed, and everything unpublished gone, when the function is left, by whichever door.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os

from convertd_daemon import channel, model
from convertd_daemon.job import (
    chain,
    check,
    clone,
    devices,
    ends,
    integrity,
    leash,
    narrow,
    paths,
    plan,
    publish,
    qemu_img,
    run,
    secrets,
    unchanged,
)


def convert(grant: model.Grant, kept: secrets.Secrets, runner: qemu_img.Runner) -> None:
    """Convert one image, and tell the channel what becomes of it."""
    line, request = runner.leash, grant.request
    line.progress(model.Phase.PREPARING)
    with contextlib.ExitStack() as stack:
        # 1. Open: names become descriptors, and the rest of the file system is closed to us.
        source = stack.enter_context(paths.open_source(grant.source, grant.peer))
        dest = stack.enter_context(ends.open_dest(grant, runner.worker.setup))
        narrow.to_roots(grant, source, dest, runner.worker)
        # 2. Ask what the source is, and what it stands on.
        links = chain.follow(grant, source, dataclasses.replace(runner, asks=True), stack)
        chain.check_encryption(grant.request.source, links[0])
        both = ends.Ends(chain=links, dest=dest)
        narrow.to_inodes(grant, both, runner.worker)
        # 3. Plan.
        planned = plan.make(grant, both.members, both.try_out(request.dest.format))
        ends.check_room(both, planned)
        line.tell(channel.Planned(plan=planned))
        whole = stack.enter_context(integrity.Examination(grant, both, kept, runner))
        if request.validate_only or isinstance(dest, devices.DeviceDest):
            # A device is not begun with what can't be ended.
            whole.finish()
        if request.validate_only:
            line.tell(channel.Succeeded(published=_validated(planned, dest, whole, line)))
            return
        compare = functools.partial(check.compare, grant, planned, both, kept, runner)
        with ends.undefined_on_failure(dest, line):
            with unchanged.watched(both.sources, compare) as watch, whole.awaited():
                # 4. Run, and ask meanwhile whether the file holds all of the image.
                line.progress(model.Phase.CONVERTING)
                warnings = run.convert(grant, planned, both, kept, whole.beside())
                if clone.SHARED in warnings:
                    watch.end()
                # 5. Check.
                after = model.Phase.VERIFYING if request.verify else model.Phase.FLUSHING
                line.progress(after, run.ALL)
                check.check(grant, planned, both, runner)
                if request.verify:
                    compare()
            # 6. Publish.
            line.progress(model.Phase.PUBLISHING, run.ALL)
            warnings += publish.flush(grant, planned, dest)
            line.check()
        with leash.no_way_back():
            replaced = publish.name(grant, dest)
            published = model.Published(
                plan=planned,
                published=True,
                verified=request.verify,
                replaced=replaced,
                allocated_size_bytes=os.fstat(dest.fd).st_blocks * 512,
                seconds=line.seconds,
                warnings=(*planned.warnings, *whole.warnings, *warnings),
            )
            line.tell(channel.Succeeded(published=published))


def inspect(grant: model.InspectGrant, runner: qemu_img.Runner) -> None:
    """Say what an image is, and what it stands on as far as the caller may read."""
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(paths.open_source(grant.source, grant.peer))
        narrow.to_roots(grant, source, None, runner.worker)
        runner.leash.tell(chain.describe(grant, source, runner, stack))


def _validated(
    planned: model.Plan, dest: ends.Dest, whole: integrity.Examination, line: leash.Leash
) -> model.Published:
    """The outcome of a request that was only to be checked."""
    return model.Published(
        plan=planned,
        published=False,
        verified=False,
        replaced=False,
        allocated_size_bytes=0,
        seconds=line.seconds,
        warnings=(*planned.warnings, *whole.warnings, *ends.expected_warnings(dest)),
    )
