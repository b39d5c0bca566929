"""A file system that gets full of the very result: what is said of how much there was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest
from harness import images, waiting
from harness.agent import conversion
from harness.callers import ALICE
from harness.daemon import Daemon
from harness.mounts import MIB, Mounts
from policies import LIBRARY, Grant, Policy, Root

from convertd.v1 import convert_pb2 as pb

PLACES: Final = Root("places", "{scratch}", mounts=True)
POLICY: Final = Policy(grants=[Grant(read=[LIBRARY, PLACES], write=[PLACES])])

ROOM_MIB: Final = 8


def free_bytes(directory: Path) -> int:
    """What an unprivileged user could write there."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


@pytest.mark.parametrize("compressed", ["result", "source"])
def test_result_of_unknown_size_that_does_not_fit_reports_the_free_space(
    daemon: Daemon, library: Path, scratch: Path, compressed: str
) -> None:
    """All that is free once it is gone again, and that it needs more than that."""
    source = library / "bulky.raw"
    with Mounts(scratch) as mounts:
        if compressed == "source":
            source = mounts.in_memory("tmpfs", "from") / "small.qcow2"
            plain = source.with_suffix(".raw")
            plain.write_bytes(b"x" * (2 * ROOM_MIB * MIB))
            images.converted(plain, source, "qcow2", "-c")
            assert source.stat().st_blocks * 512 < MIB
        small = mounts.in_memory("tmpfs", "small", f"mode=755,size={ROOM_MIB}m")
        free = free_bytes(small)
        request = conversion(source, small / "dest", source_format="", dest_format="raw")
        if compressed == "result":
            request.dest.format = "qcow2"
            request.dest.compression = pb.COMPRESSION_ZLIB
        refusal = daemon.agent(ALICE).convert(request).refusal()
        assert (refusal.status, refusal.reason) == ("RESOURCE_EXHAUSTED", "NO_SPACE")
        assert refusal.metadata["mount_point"] == str(small)
        assert int(refusal.metadata["free_bytes"]) == free
        assert int(refusal.metadata["needed_bytes"]) > free
        daemon.await_idle()
        assert os.listdir(small) == []
        waiting.until(lambda: free_bytes(small) == free, "all is free again")
