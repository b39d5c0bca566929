"""The disks that are measured: the machine's own, and loop devices that behave otherwise.

| disk | |
|---|---|
| own disk | the file system of the directory that is named on the command line |
| memory disk | ext4 on a loop device over a file in memory (tmpfs) |
| cached disk | ext4 on a loop device over a file on the own disk, through its page cache |
| slow disk | ext4 on a disk on which each request takes 1 ms and more, see slow_disk.py |
| XFS, btrfs | on a loop device over a file on the own disk; files can share blocks there |

XFS and btrfs are read and written past the page cache of the file below them: otherwise that one
would keep in memory what was dropped from theirs, and a cold source would be read from there.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.mounts import Mounts

from benchmarks import cases, fio, results, slow_disk
from benchmarks.settings import Settings

SPARE_MIB: Final = 2048
"""Room for the file system's own log and maps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk, by a directory on it."""

    name: str
    description: str
    directory: Path

    def info(self, size_mib: int) -> results.DiskInfo:
        """What the page shows of it; fio measures that with a file of that size."""
        direct_read, direct_write = fio.rates(self.directory, size_mib, direct=True)
        buffered_read, buffered_write = fio.rates(self.directory, size_mib, direct=False)
        argv = ["findmnt", "-no", "FSTYPE,OPTIONS", "--target", str(self.directory)]
        mounted = subprocess.run(argv, check=True, text=True, stdout=subprocess.PIPE).stdout
        return results.DiskInfo(
            name=self.name,
            description=self.description,
            file_system=" ".join(mounted.split()),
            direct_read=direct_read,
            direct_write=direct_write,
            buffered_read=buffered_read,
            buffered_write=buffered_write,
        )


def own_directory(home: Path) -> Path:
    """A directory for images on the machine's own disk."""
    directory = home / "own"
    directory.mkdir(exist_ok=True)
    return directory


@contextlib.contextmanager
def mounted(name: str, home: Path, settings: Settings) -> Iterator[Disk]:
    """A disk, for the length of the context. `home` is a directory on the machine's own disk."""
    with contextlib.ExitStack() as stack:
        mounts = stack.enter_context(Mounts(home))
        kind, size_mib = name.lower(), _size_mib(settings)
        if name == cases.OWN:
            directory, description = own_directory(home), "the machine's own"
        elif name == cases.MEMORY:
            below = mounts.in_memory("tmpfs", "tmpfs", f"mode=755,size={size_mib}m")
            directory = stack.enter_context(Mounts(below)).on_a_loop("ext4", "ext4", size_mib)
            description = "a loop device over a file in memory"
        elif name == cases.CACHED:
            directory = mounts.on_a_loop("ext4", "cached", size_mib)
            description = "a loop device over a file on the own disk, through the page cache"
        elif name == cases.SLOW:
            directory = stack.enter_context(slow_disk.mounted(home, size_mib))
            description = (
                f"each request takes {slow_disk.LATENCY_US} µs and its size at "
                f"{slow_disk.RATE_MB} MB/s; all together {slow_disk.TOTAL_MB} MB/s"
            )
        else:
            directory = mounts.on_a_loop(kind, kind, size_mib, direct_io=True)
            description = "a loop device over a file on the own disk, past the page cache"
        yield Disk(name=name, description=description, directory=directory)


def _size_mib(settings: Settings) -> int:
    """Room for the images, each once more, and for results."""
    extents_mib = settings.extents * settings.extent_mib * 11
    data_mib = settings.files_mib * 4 + settings.random_mib + settings.packed_mib + extents_mib
    return data_mib * 2 + SPARE_MIB
