"""Disk images with something in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Final

MIB: Final = 1024 * 1024

SMALL_MIB: Final = 8
BULKY_MIB: Final = 64


def file_system(path: Path, size_mib: int, *contents: Path) -> Path:
    """A raw image with an ext4 and real files on it, sparse, readable by root alone."""
    with path.open("wb") as file:
        file.truncate(size_mib * MIB)
    path.chmod(0o600)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(path)], check=True)
    if contents:
        _fill(path, contents)
    return path


def _fill(path: Path, contents: tuple[Path, ...]) -> None:
    point = path.with_suffix(".mounted")
    point.mkdir()
    subprocess.run(["mount", "-o", "loop", str(path), str(point)], check=True)
    try:
        for number, directory in enumerate(contents):
            shutil.copytree(directory, point / str(number), symlinks=True)
    finally:
        subprocess.run(["umount", str(point)], check=True)
        point.rmdir()


def small(path: Path) -> Path:
    """A raw image of 8 MiB: a program's code, a hole, and its code again."""
    code = Path("/usr/bin/qemu-img").read_bytes()[:MIB]
    with path.open("wb") as file:
        file.write(code)
        file.seek(SMALL_MIB * MIB - len(code))
        file.write(code)
    path.chmod(0o600)
    return path


def bulky(path: Path) -> Path:
    """A raw image of 64 MiB without a zero in it: at 1 MiB/s it takes a minute."""
    return _without_zeros(path, BULKY_MIB)


def slow(path: Path) -> Path:
    """A raw image of 4 MiB without a zero in it: at 1 MiB/s it takes four seconds."""
    return _without_zeros(path, 4)


def _without_zeros(path: Path, mib: int) -> Path:
    path.write_bytes(os.urandom(MIB) * mib)
    path.chmod(0o600)
    return path


def converted(source: Path, dest: Path, image_format: str, *options: str) -> Path:
    """An image made of another, by qemu-img itself."""
    argv = ["qemu-img", "convert", "-O", image_format, *options, str(source), str(dest)]
    subprocess.run(argv, check=True)
    dest.chmod(0o600)
    return dest


def created(path: Path, image_format: str, size_mib: int, *options: str) -> Path:
    """An empty image."""
    argv = ["qemu-img", "create", "-q", "-f", image_format, *options, str(path), f"{size_mib}M"]
    subprocess.run(argv, check=True)
    path.chmod(0o600)
    return path


def identical(one: Path, other: Path) -> bool:
    """Whether a guest would see the same on both: qemu-img compare, in strict mode or not."""
    done = subprocess.run(
        ["qemu-img", "compare", str(one), str(other)], check=False, capture_output=True, text=True
    )
    assert done.returncode in {0, 1}, done.stderr
    return done.returncode == 0


def real_files() -> tuple[Path, ...]:
    """Directories of real files that every machine has on which the tests run."""
    packages = Path(sysconfig.get_path("purelib"))
    return (packages / "grpc", packages / "hypothesis", Path(sysconfig.get_path("stdlib")))
