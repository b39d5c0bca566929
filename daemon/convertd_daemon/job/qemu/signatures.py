"""What a few bytes at an image's beginning and end say that it is. Pure: bytes in, names out.

This is no parser (decision 17). A signature picks the one driver that qemu is asked with, and says
when the bytes fit more than one kind of thing; what is in the image qemu alone finds out. Where
nothing here fits, the image is raw, as it is to qemu.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

SECTOR_BYTES: Final = 512

HEAD_BYTES: Final = 4608
"""What is read of the beginning: qemu's own probe sees 512 bytes, a partition table may follow."""

TRAILER_BYTES: Final = 1024
"""Where qemu looks for Apple's trailer. Source: qemu block/dmg.c, dmg_find_koly_offset()."""

VOLUME_OFFSET: Final = 32768
"""Where the volume descriptors of a CD begin. Source: ECMA-119, 6.2.1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Bytes of an image; what lies beyond its end is missing.

    `head` begins at 0, `volume` at VOLUME_OFFSET. `tail` is the last sector, which may not be a
    whole one: qemu rounds a size up, and looks for a VHD's footer there. `trailer` is the last 1024
    bytes, for Apple's may be followed by less than a sector of something else.
    """

    head: bytes = b""
    volume: bytes = b""
    tail: bytes = b""
    trailer: bytes = b""
    size_bytes: int = 0


# --- what qemu would take it for -----------------------------------------------------------------

_DRIVERS: Final = (
    ("qcow", 0, b"QFI\xfb\0\0\0\1"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"KDMV"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("vpc", 0, b"conectix"),
    ("vhdx", 0, b"vhdxfile"),
    ("qed", 0, b"QED\0"),
    ("parallels", 0, b"WithoutFreeSpace\2\0\0\0"),
    ("parallels", 0, b"WithouFreSpacExt\2\0\0\0"),
    ("luks", 0, b"LUKS\xba\xbe\0\1"),
    ("bochs", 0, b"Bochs Virtual HD Image"),
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format\n"),
)
"""qemu's drivers that know an image by its first 512 bytes, with place and bytes. Source: the
`_probe` functions in qemu block/*.c, 7.2 and 10.0. Of bochs and cloop no more is asked than that
they are never raw."""

_QCOW2: Final = b"QFI\xfb"
_QCOW2_VERSION: Final = 2

_VMDK_TEXT: Final = re.compile(rb"(#[^\n]*\n| +\r?\n)*version=[123]\r?\n")
"""Comments, lines of spaces, then a version. Source: qemu block/vmdk.c, vmdk_probe()."""


def driver_of(head: bytes) -> str:
    """The driver that qemu's own probe picks for an image that begins so; "raw" if none fits."""
    head = head[:SECTOR_BYTES].ljust(SECTOR_BYTES, b"\0")
    for driver, offset, magic in _DRIVERS:
        if head.startswith(magic, offset):
            return driver
    if head.startswith(_QCOW2) and _be32(head, 4) >= _QCOW2_VERSION:
        return "qcow2"
    return "vmdk" if _VMDK_TEXT.match(head) else "raw"


# --- headers that say that data is elsewhere -----------------------------------------------------

_QCOW2_DATA_FILE: Final = 1 << 2
"""Of the incompatible features. Source: qemu docs/interop/qcow2.txt."""

_SPARSE_VMDK: Final = (b"KDMV", b"COWD")


def is_sparse_vmdk(head: bytes) -> bool:
    """Whether it is a VMDK with data in it. All else is to qemu a text that names files."""
    return head.startswith(_SPARSE_VMDK)


def names_other_files(image_format: str, head: bytes) -> bool:
    """Whether qemu, reading this as `image_format`, would open files that the image names.

    A qcow2 with a data file; a VMDK that is a descriptor, or whose own descriptor counts for it has
    no capacity of its own. Older versions of qemu take such a name for any driver at all:
    `json:{…}` (CVE-2024-4467 and its kin). Source: qemu block/vmdk.c, vmdk_open_vmdk4().
    """
    if image_format == "qcow2":
        is_versioned = head.startswith(_QCOW2) and _be32(head, 4) > _QCOW2_VERSION
        return is_versioned and bool(_be32(head, 76) & _QCOW2_DATA_FILE)
    if image_format == "vmdk":
        if is_sparse_vmdk(head):
            return head.startswith(b"KDMV") and not any(head[12:20])
        return driver_of(head) == "vmdk" or b"createType" in head
    return False


VHD_FIXED: Final = 2
VHD_DYNAMIC: Final = 3
VHD_DIFFERENCING: Final = 4

VHD_LARGEST_GEOMETRY: Final = 65535 * 16 * 255 * SECTOR_BYTES
"""A disk of more is told by its current size alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VhdFooter:
    """A VHD's footer, which a dynamic one has at its beginning too. Sizes in bytes.

    Source: Microsoft, Virtual Hard Disk Image Format Specification, "Hard Disk Footer Format".
    """

    disk_type: int
    current_size_bytes: int
    geometry_bytes: int


def vhd_footer(sector: bytes) -> VhdFooter | None:
    """Read a footer; None if that is none. The last byte of an old one may be missing."""
    if len(sector) < SECTOR_BYTES - 1 or not sector.startswith(b"conectix"):
        return None
    (current,) = struct.unpack_from(">Q", sector, 48)
    cylinders, heads, sectors, disk_type = struct.unpack_from(">HBBI", sector, 56)
    return VhdFooter(
        disk_type=disk_type,
        current_size_bytes=current,
        geometry_bytes=cylinders * heads * sectors * SECTOR_BYTES,
    )


VDI_ALONE: Final = frozenset({1, 2})
"""Dynamic and fixed; 3 is for undoing, 4 differs from a parent. Source: qemu block/vdi.c."""


def vdi_type(head: bytes) -> int:
    """The type of a VDI, from its header; 0 if it is not there."""
    return int.from_bytes(head[76:80], "little")


def dmg_segments(trailer: bytes) -> int:
    """Over how many files an Apple disk image goes, from its trailer: 0 and 1 mean one.

    The most that anything there says which could be taken for one.
    """
    places = (found.start() for found in re.finditer(b"koly", trailer))
    return max((_be32(trailer, place + 60) for place in places), default=0)


# --- what else it may be -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """Something that has a disk in it, or nothing of a disk, and that qemu would take for raw.

    `format` is the one to state where qemu can read it. Else `unpack` is the command that takes
    the contents out, with IMAGE and DISK for the names; empty where there is none to tell.
    """

    name: str
    format: str = ""
    unpack: str = ""


_ZSTD: Final = Container(name="zstd data", unpack="zstd -dc IMAGE > DISK")

_CONTAINERS: Final = (
    (b"\x1f\x8b\x08", Container(name="gzip data", unpack="gzip -dc IMAGE > DISK")),
    (b"\xfd7zXZ\0", Container(name="xz data", unpack="xz -dc IMAGE > DISK")),
    (b"\x28\xb5\x2f\xfd", _ZSTD),
    (b"\x04\x22\x4d\x18", Container(name="lz4 data", unpack="lz4 -dc IMAGE > DISK")),
    (b"\x02\x21\x4c\x18", Container(name="lz4 data", unpack="lz4 -dc IMAGE > DISK")),
    (b"\x1f\x9d\x90", Container(name="compress data", unpack="gzip -dc IMAGE > DISK")),
    (b"LRZI", Container(name="lrzip data")),
    (b"070701", Container(name="a cpio archive", unpack="cpio -id < IMAGE")),
    (b"!<arch>\n", Container(name="an ar archive", unpack="ar x IMAGE")),
    (b"\0ntfsclone-image", Container(name="an ntfsclone image")),
    (b"\x89LZO\0\r\n\x1a\n", Container(name="lzop data")),
    (b"LZIP\1", Container(name="lzip data")),
    (b"PK\3\4", Container(name="a zip archive", unpack="unzip IMAGE")),
    (b"PK\5\6", Container(name="a zip archive", unpack="unzip IMAGE")),
    (b"7z\xbc\xaf\x27\x1c", Container(name="a 7z archive")),
    (b"Rar!\x1a\7", Container(name="a rar archive")),
    (b"MSWIM\0\0\0", Container(name="a Windows image (WIM)")),
    (b"EVF\t\r\n\xff\0", Container(name="an EnCase image")),
    (b"VMA\0\0\0\0\1", Container(name="a Proxmox backup (VMA)")),
    (b"\x3a\xff\x26\xed\1\0", Container(name="an Android sparse image")),
    (b"partclone-image", Container(name="a partclone image")),
    (b"sprs\0\0\0", Container(name="an Apple sparse image")),
    (b"encrcdsa", Container(name="an encrypted Apple disk image")),
    (b"# Disk DescriptorFile", Container(name="a VMDK descriptor, without the files it names")),
)
"""What begins so. No boot sector and no file system does."""

_BZIP2: Final = Container(name="bzip2 data", unpack="bzip2 -dc IMAGE > DISK")
_BZIP2_BLOCKS: Final = frozenset({b"1AY&SY", b"\x17rE8P\x90"})
_SKIPPABLE: Final = 5
"""Half of the first byte of a frame without data, with which pzstd begins. Source: RFC 8878."""
_TAR: Final = Container(name="a tar archive", unpack="tar -xf IMAGE")
_OVA: Final = Container(name="an OVA (a tar archive with the disks in it)", unpack="tar -xf IMAGE")
_DMG: Final = Container(name="an Apple disk image (dmg)", format="dmg")
_VHD: Final = Container(name="a fixed VHD", format="vpc")


def container_of(sample: Sample) -> Container | None:
    """What an image that qemu takes for raw begins or ends like, if that is no disk."""
    head = sample.head
    for magic, container in _CONTAINERS:
        if head.startswith(magic):
            return container
    if head.startswith(b"BZh") and head[3:4].isdigit() and head[4:10] in _BZIP2_BLOCKS:
        return _BZIP2
    if head[1:4] == b"\x2a\x4d\x18" and head[:1] and head[0] >> 4 == _SKIPPABLE:
        return _ZSTD
    if _is_tar(head):
        return _OVA if head[:100].rstrip(b"\0").endswith(b".ovf") else _TAR
    if _has_apple_trailer(sample):
        return _DMG
    return _VHD if _has_vhd_footer(sample) else None


def _has_gpt(sample: Sample) -> bool:
    """Whether there is a table in the second sector, of 512 bytes or of 4096.

    Its copy has to lie in the file too. In an image of another format, where the disk's first
    sectors happen to lie so (a dynamic VHD of 514 to 768 MiB), that copy's place is eight times as
    far as the disk is long. Source: UEFI, 5.3.2, AlternateLBA.
    """
    return any(
        sample.head.startswith(b"EFI PART", sector)
        and (_le64(sample.head, sector + 32) + 1) * sector <= sample.size_bytes
        for sector in (SECTOR_BYTES, 4096)
    )


def _is_tar(head: bytes) -> bool:
    """Whether the first block's own checksum is right. Source: POSIX pax, ustar format."""
    block = head[:SECTOR_BYTES]
    checksum = block[148:156].strip(b" \0")
    if len(block) < SECTOR_BYTES or not checksum or set(checksum) - set(b"01234567"):
        return False
    return int(checksum, 8) == sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _has_apple_trailer(sample: Sample) -> bool:
    return b"koly\0\0\0\4\0\0\2\0" in sample.trailer


def _has_vhd_footer(sample: Sample) -> bool:
    return vhd_footer(sample.tail) is not None


_BOOTABLE: Final = "a disk with a boot sector"
_FIXED_VHD: Final = "a fixed VHD"

_CHANCE: Final = frozenset({("luks", _BOOTABLE), ("vpc", _FIXED_VHD)})
"""What says nothing: a passphrase's salt lies in that place, and a dynamic VHD ends like a fixed
one."""

_SECOND_SELVES: Final[tuple[tuple[str, Callable[[Sample], bool]], ...]] = (
    ("a CD (ISO 9660)", lambda sample: sample.volume[1:6] == b"CD001"),
    ("a partitioned disk (GPT)", _has_gpt),
    (_BOOTABLE, lambda sample: sample.head[510:512] == b"\x55\xaa"),
    ("an Apple disk image", _has_apple_trailer),
    (_FIXED_VHD, _has_vhd_footer),
)


def second_self_of(driver: str, sample: Sample) -> str:
    """What an image that begins like one of `driver`'s is as well, as a whole; "" for none.

    A program that writes a header over the first bytes of a disk makes such an image.
    """
    for name, is_one in _SECOND_SELVES:
        if (driver, name) not in _CHANCE and is_one(sample):
            return name
    return ""


def _le64(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 8], "little")


def _be32(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "big")
