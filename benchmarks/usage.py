"""A conversion's use of CPU, memory and page cache."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path
from typing import Final, Self

from harness import processes

TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")

SAMPLE_S: Final = 0.05

KIB: Final = 1024
SECTOR: Final = 512


def cpu_s(session: int) -> float:
    """The CPU time of a session's processes, and of those that they have reaped.

    In steps of a clock tick. Source: proc_pid_stat(5).
    """
    ticks = 0
    for process in processes.of_session(session):
        try:
            with open(f"/proc/{process.pid}/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # reaped since: its parent's figures include it
        ticks += sum(int(field) for field in fields[11:15])
    return ticks * TICK_S


def stolen_s() -> float:
    """CPU time that the host gave to other guests (steal). Source: proc_stat(5)."""
    with open("/proc/stat", encoding="ascii") as file:
        name, *ticks = file.readline().split()
    if name != "cpu":
        raise LookupError(name)
    return int(ticks[7]) * TICK_S


def cached_bytes(*paths: Path) -> int:
    """How much of these files is in the page cache. Source: fincore(1)."""
    argv = ["fincore", "--bytes", "--noheadings", "--output", "RES"]
    names = [str(path) for path in paths if path.exists()]
    if not names:
        return 0
    printed = subprocess.run([*argv, *names], check=True, text=True, stdout=subprocess.PIPE).stdout
    return sum(int(number) for number in printed.split())


def drop(path: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def read(path: Path) -> None:
    """Read a file's data into the page cache. Holes are skipped: 20 GiB of them take long."""
    with path.open("rb") as file:
        end, size = 0, os.path.getsize(path)
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:  # ENXIO: no more data
                return
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)
            file.seek(start)
            while file.tell() < end and file.read(min(2**20, end - file.tell())):
                pass


class Device:
    """The block device below a directory, if it is on one."""

    def __init__(self, directory: Path) -> None:
        argv = ["findmnt", "--noheadings", "--nofsroot", "--output=SOURCE", "--target"]
        found = subprocess.run([*argv, str(directory)], check=True, text=True, capture_output=True)
        node = Path(found.stdout.strip())
        self._stat: Path | None = None
        if node.is_block_device():
            number = node.stat().st_rdev
            self._stat = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")

    def written_bytes(self) -> int:
        """How much it was given to write in all, 0 if it is unknown.

        Source: Documentation/block/stat.rst.
        """
        if self._stat is None:
            return 0
        return int(self._stat.read_text(encoding="ascii").split()[6]) * SECTOR


def dirty_bytes() -> int:
    """Dirty pages of the whole machine, those in writeback included. Source: proc_meminfo(5)."""
    return sum(_meminfo()[name] for name in ("Dirty", "Writeback"))


def _meminfo() -> dict[str, int]:
    with open("/proc/meminfo", encoding="ascii") as file:
        pairs = (line.split(":") for line in file)
        return {name: int(rest.split()[0]) * KIB for name, rest in pairs}


class DirtyPages:
    """Samples the growth of dirty pages in a thread, while the context lasts."""

    def __init__(self) -> None:
        self.most_bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._before = dirty_bytes()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self.most_bytes = max(self.most_bytes, dirty_bytes() - self._before)


def pss_kib(pid: int) -> int:
    """A process's proportional set size. Source: proc_pid_smaps(5)."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        (line,) = [line for line in file if line.startswith("Pss:")]
    return int(line.split()[1])


def peak_kib(pid: int) -> int:
    """A process's peak resident size. Source: proc_pid_status(5), VmHWM."""
    with open(f"/proc/{pid}/status", encoding="utf-8") as file:
        (line,) = [line for line in file if line.startswith("VmHWM:")]
    return int(line.split()[1])
