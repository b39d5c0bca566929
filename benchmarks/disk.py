"""The disk itself: its speed by fio, past the page cache; and whether it is idle."""

from __future__ import annotations

import json
import logging
import subprocess
import time
from pathlib import Path
from typing import Any, Final

from benchmarks import cases, measured
from benchmarks.cases import Case
from benchmarks.peers import Took

SHAPE: Final = ("--direct=1", "--ioengine=libaio", "--bs=2M", "--iodepth=8", "--fallocate=none")
"""In pieces of 2 MiB, eight at once, as qemu-img has them by default."""

FORMAT: Final = ("--output-format=json", "--eta=never")

STILL_S: Final = 0.1
POLL_S: Final = 0.01

log = logging.getLogger(__name__)


class Fio:
    """fio reads the source's bytes and writes as many: no conversion can be quicker."""

    name = "fio"
    what = "fio reads as many bytes as the source has, and writes as many, both at once."
    copies = False

    def enters(self, case: Case) -> bool:
        """See Racer. Only where every byte of the source has to be read and written."""
        return case.name in {cases.NOISE, cases.NOISE_TO_RAW}

    def convert(self, case: Case, dest: Path) -> Took:
        """See Racer. The time is fio's own figure, without its start."""
        size = f"--size={case.source.data_bytes}"
        said = _fio(
            *("--name=read", "--rw=read", f"--filename={case.source.path}", size),
            *("--name=write", "--rw=write", f"--filename={dest}", size, "--end_fsync=1"),
        )
        return Took(seconds=max(job["job_runtime"] for job in said["jobs"]) / 1000, cpu_s=0)


def settle(directory: Path, patience_s: float) -> None:
    """Wait, at most `patience_s`, until all disks have been idle for STILL_S.

    A file system that is mounted with `discard` discards the blocks of a deleted file after its
    next commit: for 1 GiB that kept the disk busy for 2 s, in which the next 1 GiB took 3.6 s to
    convert instead of 2.1 s. The next contestant was charged for it.
    """
    argv = ["sync", "--file-system", str(directory)]
    subprocess.run(argv, check=True)
    began = still_since = time.monotonic()
    before = _activity()
    while (now := time.monotonic()) - still_since < STILL_S:
        if now - began >= patience_s:
            log.info("the disks did not come to rest in %g s", patience_s)
            return
        time.sleep(POLL_S)
        after = _activity()
        if after != before:
            before, still_since = after, time.monotonic()


def _activity() -> str:
    """A text that changes with any disk's activity. Source: Documentation/iostats.rst."""
    return Path("/proc/diskstats").read_text(encoding="ascii")


def rates(directory: Path, size_mib: int) -> measured.Disk:
    """How fast the disk is written, and then read."""
    file = directory / "fio"
    one = (f"--filename={file}", f"--size={size_mib}M")
    wrote = _fio("--name=write", "--rw=write", "--end_fsync=1", *one)["jobs"][0]
    read = _fio("--name=read", "--rw=read", *one)["jobs"][0]
    file.unlink()
    return measured.Disk(
        read_bytes_per_s=read["read"]["io_bytes"] / read["job_runtime"] * 1000,
        write_bytes_per_s=wrote["write"]["io_bytes"] / wrote["job_runtime"] * 1000,
    )


def _fio(*jobs: str) -> Any:  # noqa: ANN401 - JSON is anything
    argv = ["fio", *FORMAT, *SHAPE, *jobs]
    return json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout)
