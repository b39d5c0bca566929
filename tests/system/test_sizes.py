"""Images whose size is no multiple of the blocks in which direct writes are made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest
from harness import images
from harness.agent import conversion
from harness.callers import ALICE
from harness.daemon import Daemon
from harness.mounts import Mounts
from policies import Grant, Policy, Root

from convertd.v1 import convert_pb2 as pb

PLACES: Final = Root("places", "{scratch}", mounts=True)
POLICY: Final = Policy(grants=[Grant(read=[PLACES], write=[PLACES])])


@pytest.mark.parametrize("sectors", [1, 7, 9, 679])
@pytest.mark.parametrize("source_format", ["raw", "qcow2"])
def test_raw_result_has_the_exact_size_of_the_disk(
    daemon: Daemon, scratch: Path, source_format: str, sectors: int
) -> None:
    """A tmpfs takes direct writes by the page: what is written too much is cut off again."""
    with Mounts(scratch) as mounts:
        here = mounts.in_memory("tmpfs", "here")
        data = os.urandom(sectors * 512)
        source = here / "source.raw"
        source.write_bytes(data)
        if source_format != "raw":
            source = images.converted(source, here / "source.qcow2", source_format)
        request = conversion(
            *(source, here / "dest"),
            source_format=source_format,
            dest_format="raw",
            # A job that copies a small image itself makes no direct writes.
            cache_mode=pb.CACHE_MODE_NONE,
            verify=True,
        )
        result = daemon.agent(ALICE).convert(request).result()
        assert result.dest_cache.mode == pb.CACHE_MODE_NONE
        assert result.verified
        assert (here / "dest").read_bytes() == data
        daemon.await_idle()
