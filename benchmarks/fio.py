"""fio: the least time that a conversion can take, and how fast a disk is."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, Final

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.command_lines import Took

SHAPE: Final = ("--ioengine=libaio", "--bs=2M", "--iodepth=8", "--fallocate=none")
"""In pieces of 2 MiB, eight at once, as qemu-img has them by default."""

FORMAT: Final = ("--output-format=json", "--eta=never")


class Fio:
    """fio reads the source's bytes and writes as many: no conversion can be quicker."""

    name = "fio"
    description = "fio reads as many bytes as the source has, and writes as many, both at once."
    copies = False

    def takes_part(self, case: Case) -> bool:
        """See Contestant. Only where every byte of the source has to be read and written."""
        return case.row.name in {cases.RANDOM, cases.RANDOM_TO_RAW}

    def convert(self, case: Case, dest: Path) -> Took:
        """See Contestant. The time is fio's own figure, without its start."""
        size = f"--size={case.source.data_bytes}"
        printed = _fio(
            "--direct=1",
            *("--name=read", "--rw=read", f"--filename={case.source.path}", size),
            *("--name=write", "--rw=write", f"--filename={dest}", size, "--end_fsync=1"),
        )
        return Took(seconds=max(job["job_runtime"] for job in printed["jobs"]) / 1000, cpu_s=0)


def rates(directory: Path, size_mib: int, *, direct: bool) -> tuple[float, float]:
    """Bytes per second that are read, and written, past or through the page cache."""
    file = directory / "fio"
    shape = (f"--direct={int(direct)}", f"--filename={file}", f"--size={size_mib}M")
    try:
        wrote = _fio("--name=write", "--rw=write", "--end_fsync=1", *shape)["jobs"][0]
        # fio itself drops the file from the page cache before it reads (its `invalidate`).
        read = _fio("--name=read", "--rw=read", *shape)["jobs"][0]
    finally:
        file.unlink(missing_ok=True)
    return (
        read["read"]["io_bytes"] / read["job_runtime"] * 1000,
        wrote["write"]["io_bytes"] / wrote["job_runtime"] * 1000,
    )


def _fio(*jobs: str) -> Any:  # noqa: ANN401 - JSON is anything
    argv = ["fio", *FORMAT, *SHAPE, *jobs]
    return json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout)
