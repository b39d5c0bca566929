"""Wait until the disks are idle."""

from __future__ import annotations

import logging
import subprocess
import time
from pathlib import Path
from typing import Final

IDLE_S: Final = 0.1
POLL_S: Final = 0.01

log = logging.getLogger(__name__)


def await_disks(directory: Path, timeout_s: float) -> None:
    """Wait, at most `timeout_s`, until all disks have been idle for IDLE_S.

    A file system that is mounted with `discard` discards the blocks of a deleted file after its
    next commit: for 1 GiB that kept the disk busy for 2 s, in which the next 1 GiB took 3.6 s to
    convert instead of 2.1 s. The next contestant was charged for it.
    """
    argv = ["sync", "--file-system", str(directory)]
    subprocess.run(argv, check=True)
    began = idle_since = time.monotonic()
    before = _activity()
    while (now := time.monotonic()) - idle_since < IDLE_S:
        if now - began >= timeout_s:
            log.info("the disks were not idle within %g s", timeout_s)
            return
        time.sleep(POLL_S)
        after = _activity()
        if after != before:
            before, idle_since = after, time.monotonic()


def _activity() -> str:
    """A text that changes with any disk's activity. Source: Documentation/iostats.rst."""
    return Path("/proc/diskstats").read_text(encoding="ascii")
