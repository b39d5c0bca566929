"""The way of one job, from a grant to a published image. Read this page first.

Each step takes what the earlier ones made, so that none can be left out. Everything opened is
closed, and everything unpublished gone, when the function is left, by whichever door.
"""

from __future__ import annotations

import contextlib
import os

from convertd_daemon import channel, model
from convertd_daemon.job import (
    check,
    direct,
    ends,
    leash,
    paths,
    plan,
    probe,
    publish,
    qemu_img,
    result,
    run,
    space,
)
from convertd_daemon.sandbox import confine, landlock


def convert(grant: model.Grant, runner: qemu_img.Runner) -> None:
    """Convert one image, and tell the channel what becomes of it."""
    worker, line = runner.worker, runner.leash
    line.progress(model.Phase.PREPARING)
    with contextlib.ExitStack() as stack:
        # 1. Open: names become descriptors, and the rest of the file system is closed to us.
        source = stack.enter_context(paths.open_source(grant.source, grant.peer))
        target = stack.enter_context(paths.open_target(grant))
        made = stack.enter_context(result.create(grant, target, worker.setup.identity))
        both = ends.Ends(source=source, result=made, target=target)
        confine.confine_job(
            worker.program,
            (
                landlock.Rule(where=source.fd, access=landlock.READ),
                landlock.Rule(where=made.fd, access=landlock.WRITE),
                landlock.Rule(where=target.directory, access=landlock.PUBLISH_IN),
            ),
        )
        # 2. Ask what the source is.
        stated = grant.request.source.format
        info = probe.identify(source, stated, grant.read_formats, runner)
        # 3. Plan.
        facts = plan.Facts(
            source_fd=source.fd,
            dest_fd=made.fd,
            source_direct=direct.read_refusal(source.fd),
            dest_direct=direct.write_refusal(made.fd),
            free_bytes=space.free_bytes(target),
        )
        planned = plan.make(grant, info, facts)
        space.check(target, planned.needed_bytes)
        line.tell(channel.Planned(plan=planned))
        if grant.request.validate_only:
            line.tell(channel.Succeeded(published=_validated(planned, line)))
            return
        # 4. Run.
        line.progress(model.Phase.CONVERTING)
        warnings = run.convert(grant, planned, both, runner)
        # 5. Check.
        line.progress(model.Phase.VERIFYING if grant.request.verify else model.Phase.FLUSHING, 100)
        check.check(grant, planned, both, runner)
        if grant.request.verify:
            check.compare(planned, both, runner)
        # 6. Publish.
        line.progress(model.Phase.PUBLISHING, 100)
        publish.flush(target, made)
        line.check()
        with leash.no_way_back():
            replaced = publish.name(grant, target, made)
            published = model.Published(
                plan=planned,
                published=True,
                verified=grant.request.verify,
                replaced=replaced,
                allocated_size_bytes=os.fstat(made.fd).st_blocks * 512,
                seconds=line.seconds,
                warnings=(*planned.warnings, *warnings),
            )
            line.tell(channel.Succeeded(published=published))


def inspect(grant: model.InspectGrant, runner: qemu_img.Runner) -> None:
    """Say what an image is."""
    with paths.open_source(grant.source, grant.peer) as source:
        readable = landlock.Rule(where=source.fd, access=landlock.READ)
        confine.confine_job(runner.worker.program, (readable,))
        described, text = probe.describe(source, grant.request.source.format, runner)
        probe.check_allowed(source, described, grant.read_formats)
        runner.leash.tell(channel.Inspected(chain=(described,), raw_json=text))


def _validated(planned: model.Plan, line: leash.Leash) -> model.Published:
    """The outcome of a request that was only to be checked."""
    return model.Published(
        plan=planned,
        published=False,
        verified=False,
        replaced=False,
        allocated_size_bytes=0,
        seconds=line.seconds,
        warnings=planned.warnings,
    )
