"""What is left of the file system for a job, in two steps. Fails closed.

Layers of Landlock intersect, so each step can only take away. The first leaves the roots that the
caller may read, for members of a chain that are not known yet; it comes before qemu-img has read a
byte of the image. The second leaves the opened inodes.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from convertd_daemon import model
from convertd_daemon.job import ends, paths
from convertd_daemon.sandbox import confine, landlock

if TYPE_CHECKING:
    from convertd_daemon.job.qemu_img import Worker


def to_roots(
    grant: model.Grant | model.InspectGrant,
    source: paths.Source,
    dest: ends.Dest | None,
    worker: Worker,
) -> None:
    """Close everything but the source, the destination and what the caller may read.

    Raises:
        OSError, SandboxError: Landlock refused; the job must not go on.
    """
    rules = [landlock.Rule(where=source.fd, access=landlock.READ)]
    if dest is not None:
        rules += ends.rules_of(dest)
    with contextlib.ExitStack() as stack:
        if _may_have_members(grant):
            for root in grant.readable:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    fd = paths.open_root(root)
                    stack.callback(os.close, fd)
                    rules.append(landlock.Rule(where=fd, access=landlock.READ_BENEATH))
        confine.confine_job(worker.gate, worker.program, rules)


def to_inodes(grant: model.Grant, both: ends.Ends, worker: Worker) -> None:
    """Close everything but what is open; the first step has, for a source that stands alone.

    Raises:
        OSError, SandboxError: Landlock refused; the job must not go on.
    """
    if _may_have_members(grant):
        confine.confine_job(worker.gate, worker.program, both.rules())


def _may_have_members(grant: model.Grant | model.InspectGrant) -> bool:
    """Whether the source may stand on other images: not one that was declared raw."""
    return grant.request.source.format != "raw"
