"""A disk on which each request takes a while, but many at once are fast: slow_disk.c, by FUSE."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from harness import waiting
from harness.mounts import MIB, Mounts

SOURCE: Final = Path(__file__).with_name("slow_disk.c")

LATENCY_US: Final = 1000
RATE_MB: Final = 300
TOTAL_MB: Final = 700
"""A request's latency, its own rate, and that of all requests together, in MB per second."""


@contextlib.contextmanager
def mounted(home: Path, size_mib: int) -> Iterator[Path]:
    """An ext4 on such a disk, for the length of the context. Its data are in memory."""
    with contextlib.ExitStack() as stack:
        below = stack.enter_context(Mounts(home)).in_memory("tmpfs", "slow", f"size={size_mib}m")
        content = below / "content"
        with content.open("wb") as file:
            file.truncate(size_mib * MIB)
        disk = stack.enter_context(_served(_compiled(below), content, below / "fuse"))
        attach = ["losetup", "--find", "--show", "--direct-io=on", str(disk)]
        device = _output(attach)
        stack.callback(_run, "losetup", "--detach", device)
        _run("mkfs.ext4", "-q", "-F", device)
        point = home / "slow-disk"
        point.mkdir()
        stack.callback(point.rmdir)
        _run("mount", device, str(point))
        stack.callback(_run, "umount", str(point))
        yield point


def _compiled(directory: Path) -> Path:
    program = directory / "slow_disk"
    fuse = _output(["pkg-config", "--cflags", "--libs", "fuse3"]).split()
    _run("gcc", "-O2", "-o", str(program), str(SOURCE), *fuse)
    return program


@contextlib.contextmanager
def _served(program: Path, content: Path, point: Path) -> Iterator[Path]:
    """The disk as a file."""
    point.mkdir()
    figures = (str(LATENCY_US), str(RATE_MB), str(TOTAL_MB))
    with subprocess.Popen([program, content, *figures, point], stdin=subprocess.DEVNULL) as process:
        try:
            disk = point / "disk"
            waiting.until(disk.exists, "the slow disk is there")
            yield disk
        finally:
            # The loop device is closed a moment after it was detached.
            waiting.until(lambda: _ended(process, point), "the slow disk is unmounted")
    point.rmdir()


def _ended(process: subprocess.Popen[bytes], point: Path) -> bool:
    argv = ["umount", str(point)]
    unmounted = subprocess.run(argv, check=False, capture_output=True).returncode == 0
    return unmounted or process.poll() is not None


def _output(argv: list[str]) -> str:
    return subprocess.run(argv, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
