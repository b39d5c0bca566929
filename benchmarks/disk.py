"""What the disk itself can do: fio, sequentially and past the page cache."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, Final

from benchmarks import cases, measured
from benchmarks.cases import Case
from benchmarks.peers import Took

SHAPE: Final = ("--direct=1", "--ioengine=libaio", "--bs=2M", "--iodepth=8", "--fallocate=none")
"""In pieces of 2 MiB, eight at once, as qemu-img has them by default."""

FORMAT: Final = ("--output-format=json", "--eta=never")


class Fio:
    """fio reads the source's bytes and writes as many: no conversion can be quicker."""

    name = "fio"
    what = "fio reads as many bytes as the source has, and writes as many, both at once."
    copies = False

    def enters(self, case: Case) -> bool:
        """See Racer. Only where every byte of the source has to be read and written."""
        return case.name in {cases.NOISE, cases.NOISE_TO_RAW}

    def convert(self, case: Case, dest: Path) -> Took:
        """See Racer. Time is what fio says, without its own start."""
        size = f"--size={case.source.data_bytes}"
        said = _fio(
            *("--name=read", "--rw=read", f"--filename={case.source.path}", size),
            *("--name=write", "--rw=write", f"--filename={dest}", size, "--end_fsync=1"),
        )
        return Took(seconds=max(job["job_runtime"] for job in said["jobs"]) / 1000, cpu_s=0)


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
