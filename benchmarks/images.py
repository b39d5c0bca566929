"""The images that are converted: made of the machine's own files, and of random bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.settings import GIB, MIB, Settings

FILES: Final = ("/usr/bin", "/usr/lib", "/usr/share")
"""Real files: programs, libraries, texts and pictures."""

CLUSTER: Final = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image, the size of the disk in it, and how much of that is data."""

    name: str
    path: Path
    format: str
    what: str
    virtual_bytes: int
    data_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """All of them. `xfs_empty` lies on a file system that shares blocks."""

    tiny: Image
    tiny_qcow2: Image
    files: Image
    files_qcow2: Image
    fragmented: Image
    packed: Image
    packed_qcow2: Image
    zlib: Image
    noise: Image
    empty: Image
    empty_qcow2: Image
    xfs_empty: Image


def make(directory: Path, xfs: Path, settings: Settings) -> Images:
    """Make all images, and flush them to disk."""
    tiny = _tiny(directory / "tiny.raw")
    files = _file_system(directory / "files.raw", settings.files_disk_mib, settings.files_mib)
    packed = _file_system(directory / "packed.raw", settings.packed_disk_mib, settings.packed_mib)
    empty = _almost_empty(directory / "empty.raw", settings.empty_disk_mib)
    made = Images(
        tiny=tiny,
        tiny_qcow2=_converted(tiny, "tiny.qcow2", tiny.what),
        files=files,
        files_qcow2=_converted(files, "files.qcow2", files.what),
        fragmented=_fragmented(files, directory / "fragmented.qcow2"),
        packed=packed,
        packed_qcow2=_converted(packed, "packed.qcow2", packed.what),
        zlib=_converted(packed, "zlib.qcow2", f"{packed.what}, compressed by zlib", "-c"),
        noise=_noise(directory / "noise.raw", settings.noise_mib),
        empty=empty,
        empty_qcow2=_converted(empty, "empty.qcow2", empty.what),
        xfs_empty=_almost_empty(xfs / "empty.raw", settings.empty_disk_mib, where=" on XFS"),
    )
    for directory_ in (directory, xfs):
        _run("sync", "--file-system", str(directory_))
    return made


def _tiny(path: Path) -> Image:
    """1 MiB of a program's code."""
    with open("/usr/bin/qemu-img", "rb") as program:
        path.write_bytes(program.read(MIB))
    return _image(path, "raw", "1 MiB")


def _file_system(path: Path, disk_mib: int, files_mib: int) -> Image:
    """An ext4 with so many MiB of real files on it."""
    tree = path.with_suffix(".tree")
    left = files_mib * MIB
    for number, file in enumerate(_real_files()):
        size = os.path.getsize(file)
        if size <= left:
            place = tree / str(number // 1000) / f"{number}-{os.path.basename(file)}"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
            left -= size
        if left < MIB:
            break
    with path.open("wb") as image:
        image.truncate(disk_mib * MIB)
    _run("mkfs.ext4", "-q", "-F", "-d", str(tree), str(path))
    shutil.rmtree(tree)
    return _image(path, "raw", f"{_size(disk_mib)} with {files_mib} MiB of files")


def _real_files() -> Iterator[str]:
    """The machine's files, always in the same order."""
    for tree in FILES:
        for directory, below, names in os.walk(tree):
            below.sort()
            for name in sorted(names):
                file = os.path.join(directory, name)
                if os.path.isfile(file) and not os.path.islink(file):
                    yield file


def _noise(path: Path, mib: int) -> Image:
    """Random bytes, which nothing can compress."""
    with path.open("wb") as image:
        for _ in range(mib):
            image.write(os.urandom(MIB))
    return _image(path, "raw", f"{_size(mib)} of random bytes")


def _almost_empty(path: Path, disk_mib: int, where: str = "") -> Image:
    """A large ext4 with nothing on it."""
    with path.open("wb") as image:
        image.truncate(disk_mib * MIB)
    _run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", str(path))
    return _image(path, "raw", f"{_size(disk_mib)}, almost empty{where}")


def _fragmented(files: Image, path: Path) -> Image:
    """The same disk, its clusters written in random order: neighbours are far apart."""
    size = os.path.getsize(files.path)
    _run("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size))
    starts = _clusters(files.path, size)
    random.Random(0).shuffle(starts)  # noqa: S311 - the same order each time
    # qemu-io allocates the clusters; the conversion then overwrites them with the image's data.
    commands = "".join(f"write -P 1 {start} {CLUSTER}\n" for start in starts)
    argv = ["qemu-io", "-f", "qcow2", str(path)]
    subprocess.run(argv, input=commands, text=True, check=True, stdout=subprocess.DEVNULL)
    _run("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", str(files.path), str(path))
    return _image(path, "qcow2", f"{files.what}, fragmented")


def _clusters(path: Path, size: int) -> list[int]:
    """Where a sparse file has data: the beginnings of its clusters."""
    found: list[int] = []
    with path.open("rb") as image:
        end = 0
        while end < size:
            try:
                data = os.lseek(image.fileno(), end, os.SEEK_DATA)
            except OSError:  # ENXIO: none up to the end of the file
                break
            end = os.lseek(image.fileno(), data, os.SEEK_HOLE)
            found += range(data - data % CLUSTER, end, CLUSTER)
    return found


def _converted(source: Image, name: str, what: str, *options: str) -> Image:
    path = source.path.with_name(name)
    quickly = ("-m", "16", "-W", *options) if options else ()
    argv = ("qemu-img", "convert", *quickly, "-f", source.format, "-O", "qcow2")
    _run(*argv, str(source.path), str(path))
    return _image(path, "qcow2", what)


def _image(path: Path, image_format: str, what: str) -> Image:
    argv = ["qemu-img", "info", "-f", image_format, "--output=json", str(path)]
    said = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout)
    return Image(
        name=path.stem,
        path=path,
        format=image_format,
        what=what,
        virtual_bytes=said["virtual-size"],
        data_bytes=os.stat(path).st_blocks * 512,
    )


def _size(mib: int) -> str:
    return f"{mib * MIB / GIB:g} GiB" if mib * MIB >= GIB else f"{mib} MiB"


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
