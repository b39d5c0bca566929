"""Clone raw to raw within one file system that shares blocks: nothing is read, nothing is run.

A raw image has no structure, so its copy is the file's. 20 GiB take milliseconds on XFS and btrfs,
where qemu-img reads and writes every block that is not a hole. Nothing is parsed here; what is
written is the same unnamed inode, published in the same way. Where blocks can't be shared, qemu-img
is quicker than copy_file_range(2): docs/decisions/0014.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final

from convertd_core import results, values
from convertd_daemon.job import stages
from convertd_daemon.linux import ficlone

if TYPE_CHECKING:
    from convertd_daemon.job.endpoints import Endpoints

log = logging.getLogger(__name__)

SHARED: Final = results.Warning(
    reason="BLOCKS_SHARED",
    message="the result shares the source's blocks until either is written: nothing was copied",
)
"""For callers that rely on the space being allocated now."""


def is_possible(grant: values.ConvertGrant, plan: stages.ConversionPlan, ends: Endpoints) -> bool:
    """Whether a clone gives what was asked for: two raw files, and no option about the transfer."""
    request = grant.request
    return (
        plan.source.format == plan.dest_format == "raw"
        and len(ends.chain) == 1
        and ends.source.place.root.kind is values.RootKind.FILES
        and not ends.dest.on_device
        and request.cache_mode is values.CacheMode.AUTO
        and request.dest.preallocation is values.Preallocation.OFF
        and not request.rate_limit_bytes_per_second
    )


def clone(plan: stages.ConversionPlan, ends: Endpoints) -> bool:
    """Share the source's blocks; False if the file system can't, and nothing is written then."""
    try:
        ficlone.ficlone(ends.dest.fd, ends.source.fd)
    except OSError as error:
        log.debug("no clone path=%r error=%s", ends.source.place.path, error)
        return False
    # qemu rounds a raw image up to whole sectors.
    os.ftruncate(ends.dest.fd, plan.source.virtual_size_bytes)
    return True
