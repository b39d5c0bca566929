"""Images of chance: chains of raw and qcow2, with holes, zero clusters, snapshots and bitmaps.

One is made again from its seed. No data is written that reads as zero: qemu-img leaves that out of
a result, where it can only know by reading it.
"""

from __future__ import annotations

import random
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
SECTOR: Final = 512
BLOCK: Final = 4 * KIB
"""Of the file systems: what can be shared is whole ones."""

MOST_BYTES: Final = 12 * MIB
CLUSTERS: Final = (*(64 * KIB,) * 4, 4 * KIB, 8 * KIB, 32 * KIB, 256 * KIB, MIB, 2 * MIB, 512, KIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A chain of images, and what is known of it.

    `shareable` says that all of its data is whole blocks, and none compressed; of what is not, some
    may be shared all the same. `whole` says that data is in whole clusters, none of which has a
    block of zeroes in it: so that whoever reads finds no more zeroes than a map tells.
    """

    path: Path
    format: str
    size: int
    shareable: bool
    whole: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What to convert it to: a format, and the options of a qcow2."""

    format: str
    options: dict[str, str]

    @property
    def shareable(self) -> bool:
        """Whether its clusters are whole blocks."""
        return int(self.options.get("cluster_size", BLOCK)) >= BLOCK


def image(directory: Path, seed: int) -> Image:
    """Make a chain of up to four images in an empty directory."""
    return _Chain(directory, random.Random(f"image {seed}")).make()  # noqa: S311 - to be repeated


def result(seed: int) -> Result:
    """Choose a format and options."""
    dice = random.Random(f"result {seed}")  # noqa: S311 - to be repeated
    if dice.random() < 0.4:
        return Result(format="raw", options={})
    possible = {
        "cluster_size": str(dice.choice(CLUSTERS)),
        "refcount_bits": str(1 << dice.randint(0, 6)),
        "lazy_refcounts": "on",
    }
    options = {name: value for name, value in possible.items() if dice.random() < 0.5}
    return Result(format="qcow2", options=options or {"compat": dice.choice(["0.10", "1.1"])})


class _Chain:
    """A chain in the making."""

    def __init__(self, directory: Path, dice: random.Random) -> None:
        self.directory, self.dice = directory, dice
        self.shareable = True
        # All in whole clusters of the largest size, or anywhere.
        self.unit = dice.choice([2 * MIB, 64 * KIB, BLOCK, SECTOR])
        self.whole = self.unit >= 64 * KIB
        self.top: Path | None = None
        self.format = "raw"

    def make(self) -> Image:
        """Begin with the lowest, and put overlays on it."""
        sizes = [self.size() for _ in range(self.dice.choice([1, 1, 2, 2, 3, 4]))]
        for number, size in enumerate(sizes):
            if number == 0 and self.dice.random() < 0.4:
                self.add_raw(size)
            else:
                self.add_qcow2(number, size)
        assert self.top is not None
        # What ends within a block, below another image, is followed by zeroes of no file.
        if any(size % BLOCK for size in sizes[:-1]):
            self.shareable = False
        return Image(
            path=self.top,
            format=self.format,
            size=sizes[-1],
            shareable=self.shareable,
            whole=self.whole,
        )

    def size(self) -> int:
        """How large a disk is: whole sectors, and more often whole blocks."""
        unit = self.dice.choice([MIB, MIB, 64 * KIB, BLOCK, SECTOR])
        return self.dice.randint(1, MOST_BYTES // unit) * unit

    def add_raw(self, size: int) -> None:
        """A raw image: data and holes."""
        path = self.directory / "base.raw"
        with path.open("wb") as file:
            file.truncate(size)
            for start, length in self.stretches(size, max(self.unit, BLOCK)):
                file.seek(start)
                file.write(bytes([self.dice.randint(1, 255)]) * length)
        self.top, self.format = path, "raw"

    def add_qcow2(self, number: int, size: int) -> None:
        """A qcow2 on whatever is there; its data below a snapshot, or with a bitmap."""
        path = self.directory / f"{number}.qcow2"
        cluster = self.cluster_size()
        options = {"cluster_size": str(cluster), **self.options(cluster)}
        compresses = self.dice.random() < 0.1
        backing = ("-b", self.top.name, "-F", self.format) if self.top else ()
        listed = ",".join(f"{name}={value}" for name, value in options.items())
        qemu_img("create", "-q", "-f", "qcow2", *backing, "-o", listed, path, str(size))
        self.write(path, size, cluster, compresses=compresses)
        # Clusters of a snapshot are counted twice, which not every width has room for.
        if self.dice.random() < 0.3 and "refcount_bits" not in options:
            qemu_img("snapshot", "-c", "before", path)
            self.write(path, size, cluster, compresses=compresses)
        if self.dice.random() < 0.2 and options.get("compat") != "0.10":
            qemu_img("bitmap", "--add", path, "bits")
            self.write(path, size, cluster, compresses=compresses)
        self.top, self.format = path, "qcow2"

    def cluster_size(self) -> int:
        """Of the whole ones, data is in whole clusters, whatever image it is written to."""
        possible = [size for size in CLUSTERS if not self.whole or size <= self.unit]
        size = self.dice.choice(possible)
        if size < BLOCK:
            self.shareable = False
        return size

    def options(self, cluster: int) -> dict[str, str]:
        """The rest of its options."""
        chosen = self.dice.choice(
            [
                {},
                {},
                {"lazy_refcounts": "on"},
                {"refcount_bits": str(1 << self.dice.randint(0, 6))},
                {"compat": "0.10"},
                {"extended_l2": "on"},
                {"preallocation": "metadata"} if self.top is None else {},
            ]
        )
        if "compat" in chosen or "preallocation" in chosen:
            # The one has no zero clusters, so that zeroes are data; the other has them everywhere.
            self.whole = False
        if "extended_l2" in chosen:
            if cluster < 16 * KIB:
                return {}
            self.shareable = self.shareable and cluster // 32 >= BLOCK
        return chosen

    def write(self, path: Path, size: int, cluster: int, *, compresses: bool) -> None:
        """Write data, zeroes and holes."""
        commands = []
        for start, length in self.stretches(size, self.unit):
            kind = self.dice.choice(["data", "data", "data", "zeroes", "discard"])
            if compresses:
                # qemu-io 7.2 marks an image as corrupt if it compresses where it has discarded.
                kind = "data"
            pattern = self.dice.randint(1, 255)
            if kind == "data" and compresses and start + cluster <= size:
                commands.append(f"write -q -c -P {pattern} {start - start % cluster} {cluster}")
                self.shareable = False
            elif kind == "data":
                commands.append(f"write -q -P {pattern} {start} {length}")
            elif kind == "zeroes":
                commands.append(f"write -q -z {start} {length}")
            else:
                commands.append(f"discard -q {start} {length}")
        if commands:
            arguments = [part for command in commands for part in ("-c", command)]
            argv = ["qemu-io", "-f", "qcow2", *arguments, str(path)]
            # What is compressed can't be written over what is there: that fails alone.
            subprocess.run(argv, check=not compresses, stdout=subprocess.DEVNULL)

    def stretches(self, size: int, unit: int) -> list[tuple[int, int]]:
        """Some places within a disk."""
        found = []
        for _ in range(self.dice.randint(0, 6)):
            start = self.dice.randint(0, size // unit) * unit
            length = min(self.dice.randint(1, max(MIB // unit, 2)) * unit, size - start)
            if length:
                found.append((start, length))
        return found


def qemu_img(*argv: str | Path) -> None:
    """Run qemu-img."""
    subprocess.run(["qemu-img", *map(str, argv)], check=True, stdout=subprocess.DEVNULL)
