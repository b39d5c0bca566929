"""Images that lie, made byte by byte or by qemu-img itself."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SIZE: Final = 65536
"""The virtual size of a forged image, and the least that a victim has."""

CLUSTER: Final = 65536

BACKING_FORMAT: Final = 0xE2792ACA
DATA_FILE: Final = 0x44415441

HAS_DATA_FILE: Final = 4
"""The bit among the incompatible features of a qcow2. Source: qemu docs/interop/qcow2.txt."""
RAW_DATA_FILE: Final = 2
"""The bit among its autoclear features."""

_COPIED: Final = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class Qcow2:
    """A qcow2 version 3, as its header tells it. What is not said is as in an honest, empty one."""

    size: int = SIZE
    backing: str = ""
    backing_format: str = ""
    data_file: str = ""
    cluster_bits: int = 16
    l1_entries: int = 1
    l1_offset: int = 3 * CLUSTER
    refcount_table_clusters: int = 1
    snapshots: int = 0
    snapshots_offset: int = 0
    refcount_order: int = 4
    bitmaps: int = 0

    def data(self) -> bytes:
        """The image: header, reference counts, an L1 with one L2, and nothing else."""
        used = 5
        table = struct.pack(">Q", 2 * CLUSTER)
        counts = struct.pack(">H", 1) * used
        l1 = struct.pack(">Q", 4 * CLUSTER | _COPIED)
        # With a data file, its clusters are mapped one to one.
        l2 = [
            n * CLUSTER | _COPIED for n in range(-(-self.size // CLUSTER) if self.data_file else 0)
        ]
        l2_table = struct.pack(f">{len(l2)}Q", *l2)
        parts = (self.header(), table, counts, l1, l2_table)
        return b"".join(part.ljust(CLUSTER, b"\0") for part in parts)

    def header(self) -> bytes:
        """The header, its extensions and its names."""
        extensions = b"".join(
            struct.pack(">II", kind, len(text)) + text + bytes(-len(text) % 8)
            for kind, text in (
                (BACKING_FORMAT, self.backing_format.encode()),
                (DATA_FILE, self.data_file.encode()),
            )
            if text
        )
        if self.bitmaps:
            fields = struct.pack(">IIQQ", self.bitmaps, 0, 24, 5 * CLUSTER)
            extensions += struct.pack(">II", 0x23852875, len(fields)) + fields
        extensions += bytes(8)
        name = self.backing.encode()
        fixed = struct.pack(
            ">4sIQIIQIIQQIIQQQQII",
            *(b"QFI\xfb", 3),
            *(104 + len(extensions) if name else 0, len(name)),
            *(self.cluster_bits, self.size, 0),
            *(self.l1_entries, self.l1_offset),
            *(CLUSTER, self.refcount_table_clusters),
            *(self.snapshots, self.snapshots_offset),
            HAS_DATA_FILE if self.data_file else 0,
            0,
            (RAW_DATA_FILE if self.data_file else 0) | (1 if self.bitmaps else 0),
            *(self.refcount_order, 104),
        )
        return fixed + extensions + name


def on_a_raw_disk(image: Qcow2, size: int = 16 * CLUSTER) -> bytes:
    """What a guest can make of its raw disk: a header at its beginning, then the rest."""
    return image.data().ljust(size, b"\x55")


def flat_vmdk(*extents: str, sectors: int = SIZE // 512, kind: str = "monolithicFlat") -> bytes:
    """A VMDK descriptor, whose data is in other files."""
    lines = "\n".join(f'RW {sectors} FLAT "{extent}" 0' for extent in extents)
    return f"""# Disk DescriptorFile
version=1
CID=fffffffe
parentCID=ffffffff
createType="{kind}"

# Extent description
{lines}

# The Disk Data Base
#DDB
ddb.virtualHWVersion = "4"
ddb.geometry.cylinders = "1"
ddb.geometry.heads = "16"
ddb.geometry.sectors = "63"
ddb.adapterType = "ide"
""".encode()


def sparse_vmdk_with(descriptor: bytes) -> bytes:
    """A VMDK with the header of a sparse one, and a descriptor inside that names other files.

    With a capacity of zero qemu goes by the descriptor. Source: qemu block/vmdk.c, vmdk_open_vmdk4.
    """
    header = struct.pack("<4sIIQQQQIQQQ", b"KDMV", 1, 3, 0, 128, 1, 20, 512, 0, 0, 128)
    return header.ljust(512, b"\0") + descriptor.ljust(128 * 512, b"\0")


def overlay(path: Path, image_format: str, backing: Path, backing_format: str) -> bytes:
    """An image on top of another, as qemu-img itself makes it; `path` is only for the moment."""
    argv = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        image_format,
        "-b",
        str(backing),
        "-F",
        backing_format,
    ]
    subprocess.run([*argv, str(path)], check=True)
    data = path.read_bytes()
    path.unlink()
    return data


Forge = Callable[[str], bytes]
"""Make an image that names a victim."""
