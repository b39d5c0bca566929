"""Confine a job's view of the file system, in two steps. Fails closed.

Layers of Landlock intersect, so each step can only take away. The first leaves the roots that the
caller may read, for members of a chain that are not known yet, or none if the source says that it
stands alone; it comes before qemu-img has read a byte of the image. The second leaves the opened
inodes.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from convertd_core import values
from convertd_daemon.job.files import opened_source, paths
from convertd_daemon.sandbox import confine, landlock

if TYPE_CHECKING:
    from convertd_daemon.job.endpoints import Endpoints
    from convertd_daemon.job.files.destination import Destination
    from convertd_daemon.job.qemu.execution import Program


def to_roots(
    grant: values.Grant,
    source: opened_source.Source,
    dest: Destination | None,
    worker: Program,
) -> None:
    """Close everything but the source, the destination and what the caller may read.

    Raises:
        OSError, SandboxError: Landlock refused; the job must not go on.
    """
    rules = [landlock.Rule(where=source.fd, access=landlock.READ)]
    if dest is not None:
        rules += dest.rules()
    with contextlib.ExitStack() as stack:
        if _may_have_members(grant, source):
            for root in grant.readable:
                # A root that can't be opened is reported by the code that opens a member in it.
                with contextlib.suppress(OSError):
                    fd = paths.open_root(root)
                    stack.callback(os.close, fd)
                    rules.append(landlock.Rule(where=fd, access=landlock.READ_BENEATH))
        confine.confine_job(worker.program, rules)


def to_inodes(grant: values.ConvertGrant, ends: Endpoints, worker: Program) -> None:
    """Close everything but what is open; the first step has, for a source that stands alone.

    Raises:
        OSError, SandboxError: Landlock refused; the job must not go on.
    """
    if _may_have_members(grant, ends.source):
        confine.confine_job(worker.program, ends.rules())


STAND_ALONE: Final = frozenset({"raw", "vdi", "vpc", "vhdx", "parallels", "luks", "dmg"})
"""Formats in which qemu-img follows no image to another one."""

_QCOW2: Final = b"QFI\xfb"
_NAME_AT: Final = slice(8, 16)
"""How a qcow2 begins, and what in its header says where its backing file's name is: 0 if it has
none. Source: qemu docs/interop/qcow2.rst."""


def _may_have_members(grant: values.Grant, source: opened_source.Source) -> bool:
    """Whether other images than the source may have to be opened.

    The image's own header may decide: a wrong "no" only takes rights away, and the image is then
    refused.
    """
    if grant.request.source.format in STAND_ALONE:
        return False
    with contextlib.suppress(OSError):  # the next read reports it
        begin = os.pread(source.fd, _NAME_AT.stop, 0)
        return not (begin.startswith(_QCOW2) and begin[_NAME_AT] == bytes(8))
    return True
