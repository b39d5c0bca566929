"""Images in what qemu-img takes for a disk: VHDs by their own rules, archives, two in one."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import lzma
import struct
import subprocess
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from typing import Final

from hostile.forged import Qcow2

SECTOR: Final = 512
MIB: Final = 1024 * 1024
VHD_BLOCK: Final = 2 * MIB

FIXED: Final = 2
DYNAMIC: Final = 3
DIFFERENCING: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Vhd:
    """A VHD as its footer tells it. Source: Microsoft's Image Format Specification.

    `geometry` is cylinders, heads and sectors; `creator` the four letters of a program.
    """

    size: int = 10 * MIB
    disk_type: int = FIXED
    creator: bytes = b"vbox"
    geometry: tuple[int, int, int] = (301, 4, 17)
    parent: str = ""

    def footer(self) -> bytes:
        """The last sector, and the first one of all but the fixed."""
        offset = 2**64 - 1 if self.disk_type == FIXED else SECTOR
        fields = (b"conectix", 2, 0x10000, offset, 0x2A000000, self.creator, 0x50000, b"Wi2k")
        sized = (self.size, self.size, *self.geometry, self.disk_type, 0)
        packed = struct.pack(">8sIIQI4sI4sQQHBBII", *fields, *sized)
        data = (packed + b"\x11" * 16).ljust(SECTOR, b"\0")
        return data[:64] + struct.pack(">I", ~sum(data) & 0xFFFFFFFF) + data[68:]

    def fixed(self, disk: bytes) -> bytes:
        """The disk, and its footer."""
        return disk + self.footer()

    def sparse(self, blocks: dict[int, bytes]) -> bytes:
        """The image with these blocks of two MiB, the others absent: dynamic, or differencing."""
        count = -(-self.size // VHD_BLOCK)
        table_at = SECTOR + 1024
        fields = (b"cxsparse", 2**64 - 1, table_at, 0x10000, count, VHD_BLOCK, 0)
        header = struct.pack(">8sQQIIII", *fields) + b"\x22" * 16
        header = header.ljust(64, b"\0") + self.parent.encode("utf-16-be")
        header = header.ljust(1024, b"\0")
        header = header[:36] + struct.pack(">I", ~sum(header) & 0xFFFFFFFF) + header[40:]
        table = bytearray(b"\xff" * -(-count * 4 // SECTOR) * SECTOR)
        data, place = b"", table_at + len(table)
        for number, block in sorted(blocks.items()):
            struct.pack_into(">I", table, number * 4, (place + len(data)) // SECTOR)
            data += b"\xff" * SECTOR + block.ljust(VHD_BLOCK, b"\0")
        return self.footer() + header + bytes(table) + data + self.footer()


def dmg(disk: bytes, *, segments: int = 1) -> bytes:
    """An Apple disk image of one compressed chunk. Source: qemu block/dmg.c."""
    body = zlib.compress(disk)
    sectors = len(disk) // SECTOR
    table = struct.pack(">4sIQQQII", b"mish", 1, 0, sectors, 0, 520, 0).ljust(64, b"\0")
    table += struct.pack(">II", 2, 32) + bytes(128) + struct.pack(">I", 2)
    for kind, first, count, at, length in (
        (0x80000005, 0, sectors, 0, len(body)),
        (0xFFFFFFFF, sectors, 0, len(body), 0),
    ):
        table += struct.pack(">IIQQQQ", kind, 0, first, count, at, length)
    plist = (
        b'<?xml version="1.0" encoding="UTF-8"?>\n<plist version="1.0"><dict>'
        b"<key>resource-fork</key><dict><key>blkx</key><array><dict><key>Data</key><data>\n"
        + base64.encodebytes(table)
        + b"</data></dict></array></dict></dict></plist>\n"
    )
    trailer = bytearray(SECTOR)
    struct.pack_into(
        ">4sIIIQQQQQII", trailer, 0, b"koly", 4, SECTOR, 1, 0, 0, len(body), 0, 0, 1, segments
    )
    struct.pack_into(">QQ", trailer, 0xD8, len(body), len(plist))
    struct.pack_into(">Q", trailer, 0x1EC, sectors)
    return body + plist + bytes(trailer)


def tar(name: str, content: bytes) -> bytes:
    """An archive of one file."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    """An archive of one file."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return packed.getvalue()


def packed(disk: bytes) -> dict[str, bytes]:
    """The disk in each thing that a command takes it out of again, by that command's name."""
    return {
        "gzip": gzip.compress(disk),
        "xz": lzma.compress(disk),
        "bzip2": bz2.compress(disk),
        "zstd": _piped("zstd", disk),
        "lz4": _piped("lz4", disk),
        "unzip": zipped("DISK", disk),
        "tar": tar("DISK", disk),
    }


def _piped(program: str, data: bytes) -> bytes:
    return subprocess.run([program, "-c"], input=data, check=True, capture_output=True).stdout


def cd(system_area: bytes = b"") -> bytes:
    """As much of a CD as tells that it is one. Source: ECMA-119, 8.4."""
    volume = b"\1CD001\1\0" + b"LINUX".ljust(32) + b"LIVE".ljust(32)
    return (
        system_area.ljust(32768, b"\0")
        + volume.ljust(2048, b"\0")
        + b"\xffCD001\1".ljust(2048, b"\0")
        + b"\xa5" * MIB
    )


def gpt(sector: int = SECTOR, *, size: int = 0) -> bytes:
    """A partitioned disk's first sectors, and something on it; `size` if it is to go on."""
    boot = bytes(446) + b"\0\0\2\0\xee\xff\xff\xff" + struct.pack("<II", 1, 2047)
    first = boot.ljust(510, b"\0") + b"\x55\xaa"
    size = size or 64 * 1024 + MIB
    table = b"EFI PART\0\0\1\0\x5c\0\0\0".ljust(24, b"\0")
    table += struct.pack("<QQ", 1, size // sector - 1)
    disk = (first.ljust(sector, b"\0") + table).ljust(64 * 1024, b"\0")
    return disk.ljust(64 * 1024 + MIB, b"\xa5")


def with_header(disk: bytes) -> bytes:
    """A disk over whose first bytes somebody has written the header of a qcow2 of its own.

    What the header leads to lies behind the disk, so that the disk stays what it was.
    """
    cluster = 65536
    start = -(-len(disk) // cluster)
    slots = [(start + number) * cluster for number in range(4)]
    header = Qcow2(l1_offset=slots[2]).header()
    header = header[:48] + struct.pack(">Q", slots[0]) + header[56:]
    counts = struct.pack(">Q", slots[1]), struct.pack(">H", 1) * (start + 4)
    tables = (*counts, struct.pack(">Q", slots[3] | 1 << 63), b"")
    body = b"".join(table.ljust(cluster, b"\0") for table in tables)
    return (header + disk[len(header) :]).ljust(start * cluster, b"\0") + body
