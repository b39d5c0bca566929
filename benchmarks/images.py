"""The images that are converted: made of the machine's own files, and of random bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.settings import GIB, MIB, Settings

FILES: Final = ("/usr/bin", "/usr/lib", "/usr/share")
"""Real files: programs, libraries, texts and pictures."""

CLUSTER: Final = 64 * 1024

MORE: Final = 10
"""How much more data the image with the larger extents has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image, the size of the disk in it, and how much of that is data.

    `backing` are the other files of its chain.
    """

    name: str
    path: Path
    format: str
    description: str
    virtual_bytes: int
    data_bytes: int
    backing: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that are read when it is converted."""
        return (self.path, *self.backing)


class Images:
    """Images in one directory, each made when it is first asked for.

    What takes long to make is copied from `originals`, if there are some.
    """

    def __init__(
        self, directory: Path, settings: Settings, originals: Images | None = None
    ) -> None:
        self.directory = directory
        self._settings = settings
        self._originals = originals
        self._made: dict[str, Image] = {}
        self._makers: dict[str, Callable[[Path], Image]] = {
            "tiny.raw": self._tiny,
            "tiny.qcow2": lambda path: _converted(self.make("tiny.raw"), path),
            "files.raw": self._files,
            "files.qcow2": lambda path: _converted(self.make("files.raw"), path),
            "fragmented.qcow2": lambda path: _fragmented(self.make("files.raw"), path),
            "packed.raw": self._packed,
            "packed.qcow2": lambda path: _converted(self.make("packed.raw"), path),
            "zlib.qcow2": lambda path: _compressed(self.make("packed.raw"), path),
            "random.raw": self._random,
            "empty.raw": self._empty,
            "empty.qcow2": lambda path: _converted(self.make("empty.raw"), path),
            "chain.qcow2": lambda path: _chain(self.make("files.qcow2"), path),
            "small extents.raw": lambda path: self._extents(path, 1),
            "small extents.qcow2": lambda path: _converted(self.make("small extents.raw"), path),
            "large extents.raw": lambda path: self._extents(path, MORE),
            "large extents.qcow2": lambda path: _converted(self.make("large extents.raw"), path),
        }

    def make(self, name: str) -> Image:
        """The image of that name, a key of `_makers`, made unless it is there."""
        if name not in self._made:
            path = self.directory / name.replace(" ", "-")
            original = self._originals and name in COPIED and self._originals.make(name)
            self._made[name] = _copied(original, path) if original else self._makers[name](path)
        return self._made[name]

    def flush(self) -> None:
        """Write all that was made to the disk."""
        _run("sync", "--file-system", str(self.directory))

    def _tiny(self, path: Path) -> Image:
        """1 MiB of a program's code."""
        with open("/usr/bin/qemu-img", "rb") as program:
            path.write_bytes(program.read(MIB))
        return _image(path, "raw", "1 MiB")

    def _files(self, path: Path) -> Image:
        return _file_system(path, self._settings.files_disk_mib, self._settings.files_mib)

    def _packed(self, path: Path) -> Image:
        return _file_system(path, self._settings.packed_disk_mib, self._settings.packed_mib)

    def _random(self, path: Path) -> Image:
        """Random bytes, which nothing can compress."""
        mib = self._settings.random_mib
        with path.open("wb") as image:
            for _ in range(mib):
                image.write(os.urandom(MIB))
        return _image(path, "raw", f"{_size(mib)} of random bytes")

    def _empty(self, path: Path) -> Image:
        """A large ext4 with nothing on it."""
        disk_mib = self._settings.empty_disk_mib
        with path.open("wb") as image:
            image.truncate(disk_mib * MIB)
        _run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", str(path))
        return _image(path, "raw", f"{_size(disk_mib)}, almost empty")

    def _extents(self, path: Path, times: int) -> Image:
        """As many extents of data, evenly spread, whatever their size."""
        number, size = self._settings.extents, self._settings.extent_mib * times * MIB
        disk_mib = self._settings.files_disk_mib
        some = os.urandom(MIB)
        with path.open("wb") as image:
            image.truncate(disk_mib * MIB)
            for start in (one * (disk_mib // number) * MIB for one in range(number)):
                os.posix_fallocate(image.fileno(), start, size)
                image.seek(start)
                for _ in range(size // MIB):
                    image.write(some)
        description = f"{number * size // MIB} MiB in {number} extents"
        return _image(path, "raw", f"{_size(disk_mib)} with {description}")


COPIED: Final = frozenset({"files.raw", "fragmented.qcow2", "packed.raw", "random.raw"})
"""What takes long to make."""


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


def _fragmented(files: Image, path: Path) -> Image:
    """The same disk, its clusters written in random order: neighbours are far apart."""
    size = os.path.getsize(files.path)
    _run("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size))
    starts = _clusters(files.path, size)
    random.Random(0).shuffle(starts)  # noqa: S311 - the same order each time
    # qemu-io allocates the clusters; the conversion then overwrites them with the image's data.
    _qemu_io(path, "".join(f"write -P 1 {start} {CLUSTER}\n" for start in starts))
    _run("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", str(files.path), str(path))
    return _image(path, "qcow2", f"{files.description}, fragmented")


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


def _chain(base: Image, path: Path) -> Image:
    """Two overlays over an image: each rewrites 1 MiB in 100 of the disk, and zeroes a cluster."""
    overlays = [path.with_name("middle.qcow2"), path]
    below = base.path
    for number, overlay in enumerate(overlays):
        backing = ("-b", below.name, "-F", "qcow2")
        _run("qemu-img", "create", "-q", "-f", "qcow2", *backing, str(overlay))
        first = (10 + 40 * number) * MIB
        starts = range(first, base.virtual_bytes - MIB, 100 * MIB)
        commands = "".join(
            f"write -P {number + 1} {at} {MIB}\nwrite -z {at + MIB} {CLUSTER}\n" for at in starts
        )
        _qemu_io(overlay, commands)
        below = overlay
    made = _image(path, "qcow2", f"{base.description}, below two overlays")
    return Image(
        name=made.name,
        path=path,
        format="qcow2",
        description=made.description,
        virtual_bytes=made.virtual_bytes,
        data_bytes=base.data_bytes + sum(_data_bytes(overlay) for overlay in overlays),
        backing=(overlays[0], base.path),
    )


def _copied(original: Image, path: Path) -> Image:
    _run("cp", "--sparse=always", "--reflink=never", str(original.path), str(path))
    return _image(path, original.format, original.description)


def _converted(source: Image, path: Path, *options: str) -> Image:
    argv = ("qemu-img", "convert", *options, "-f", source.format, "-O", "qcow2")
    _run(*argv, str(source.path), str(path))
    return _image(path, "qcow2", source.description)


def _compressed(source: Image, path: Path) -> Image:
    made = _converted(source, path, "-m", "16", "-W", "-c")
    return _image(path, "qcow2", f"{made.description}, compressed by zlib")


def _image(path: Path, image_format: str, description: str) -> Image:
    argv = ["qemu-img", "info", "-f", image_format, "--output=json", str(path)]
    printed = subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout
    return Image(
        name=path.name,
        path=path,
        format=image_format,
        description=description,
        virtual_bytes=json.loads(printed)["virtual-size"],
        data_bytes=_data_bytes(path),
    )


def _data_bytes(path: Path) -> int:
    return os.stat(path).st_blocks * 512


def _size(mib: int) -> str:
    return f"{mib * MIB / GIB:g} GiB" if mib * MIB >= GIB else f"{mib} MiB"


def _qemu_io(path: Path, commands: str) -> None:
    argv = ["qemu-io", "-f", "qcow2", str(path)]
    subprocess.run(argv, input=commands, text=True, check=True, stdout=subprocess.DEVNULL)


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
