"""Images of each format, corrupted in their headers and tables as AFL would. All by a seed."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import encrypting

from hostile import forged
from hostile.forged import Qcow2
from hostile.secret import Secret

PASSPHRASE: Final = b"a passphrase of the fuzz"

SIZE: Final = 1024 * 1024

TABLE_BYTES: Final = 512
"""Structures are looked for in pieces of this size: those that are neither empty nor data."""

ENCRYPTED_BYTES: Final = 5 * forged.CLUSTER

FILLING: Final = b"\xa5"
"""What the seeds' data consists of, so that it can be told from their structures."""

INTERESTING: Final = (0, 1, 2, 16, 32, 64, 127, 128, 255, 256, 512, 1000, 4095, 4096, 32767)
EXTREME: Final = tuple(
    value
    for bits in (8, 16, 31, 32, 48, 56, 62, 63, 64)
    for value in (2**bits - 1, 2**bits, 2 ** (bits - 1), 2**bits - 512)
)
WIDTHS: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """An image to begin with. `repair` mends its checksums.

    One that is `encrypted` takes the passphrase; one that names a secret file is refused as it is.
    """

    name: str
    format: str
    data: bytes
    encrypted: bool = False
    names_a_secret: bool = False
    repair: Callable[[bytearray], None] = lambda _: None

    def structures(self) -> list[int]:
        """Where its header and its tables are; of what is encrypted only the beginning can tell."""
        end = min(len(self.data), ENCRYPTED_BYTES) if self.encrypted else len(self.data)
        pieces = range(0, end, TABLE_BYTES)
        empty = (bytes(TABLE_BYTES), FILLING * TABLE_BYTES)
        return [at for at in pieces if self.data[at : at + TABLE_BYTES] not in empty]


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrupted:
    """One image of the fuzz, which its seed's name and its number tell again."""

    seed: Seed
    number: int
    data: bytes


def seeds(directory: Path, secret: Secret) -> tuple[Seed, ...]:
    """One or several of each format; some name a secret file, as an attacker's would."""
    raw = directory / "seed.raw"
    raw.write_bytes(b"".join((FILLING * (SIZE // 4), bytes(SIZE // 2), FILLING * (SIZE // 4))))
    key = directory / "key"
    key.write_bytes(PASSPHRASE)
    made = [
        *_honest(directory, raw),
        *_encrypted(directory, raw, key),
        *_naming(directory, secret),
        Seed(name="raw", format="raw", data=raw.read_bytes()[: 64 * 1024]),
    ]
    return tuple(made)


HONEST: Final = (
    ("qcow2", ""),
    ("qcow2", "compat=0.10"),
    ("qcow2", "cluster_size=512"),
    ("qcow2", "extended_l2=on,cluster_size=16384"),
    ("vmdk", ""),
    ("vmdk", "subformat=streamOptimized"),
    ("vdi", ""),
    ("vdi", "static=on"),
    ("vpc", "force_size=on"),
    ("vpc", "subformat=fixed,force_size=on"),
    ("vhdx", "block_size=1048576"),
    ("qed", ""),
    ("parallels", ""),
)


def _honest(directory: Path, raw: Path) -> Iterator[Seed]:
    for image_format, options in HONEST:
        path = directory / "seed"
        argv = ["qemu-img", "convert", "-f", "raw", "-O", image_format]
        subprocess.run(
            [*argv, *(("-o", options) if options else ()), str(raw), str(path)], check=True
        )
        repair = _mend_vhdx if image_format == "vhdx" else lambda _: None
        name = f"{image_format} {options}".strip()
        yield Seed(name=name, format=image_format, data=path.read_bytes(), repair=repair)
        path.unlink()
    for kind in ("zlib", "zstd"):
        path = directory / "seed"
        argv = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2"]
        subprocess.run([*argv, "-o", f"compression_type={kind}", str(raw), str(path)], check=True)
        subprocess.run(["qemu-img", "snapshot", "-c", "a snapshot", str(path)], check=True)
        subprocess.run(["qemu-img", "bitmap", "--add", str(path), "a-bitmap"], check=True)
        yield Seed(name=f"qcow2 {kind}, with more", format="qcow2", data=path.read_bytes())
        path.unlink()


def _encrypted(directory: Path, raw: Path, key: Path) -> Iterator[Seed]:
    for image_format, prefix in (("qcow2", "encrypt."), ("luks", "")):
        path = directory / "seed"
        options = f"{prefix}key-secret=s,{prefix}iter-time=10"
        if prefix:
            options += ",encrypt.format=luks"
        argv = ["convert", "--object", f"secret,id=s,file={key}", "-f", "raw", "-O", image_format]
        encrypting.qemu_img(*argv, "-o", options, raw, path)
        yield Seed(
            name=f"{image_format}, encrypted",
            format=image_format,
            data=path.read_bytes(),
            encrypted=True,
        )
        path.unlink()


def _naming(directory: Path, secret: Secret) -> Iterator[Seed]:
    name = str(secret.raw)
    flat = forged.flat_vmdk(name)
    images = [
        ("vmdk, flat", "vmdk", flat),
        ("vmdk, flat in sparse", "vmdk", forged.sparse_vmdk_with(flat)),
        ("qcow2, backing", "qcow2", Qcow2(backing=name, backing_format="raw").data()),
        ("qcow2, data", "qcow2", Qcow2(data_file=name).data()),
    ]
    for image_format, base, kind in (
        ("qed", secret.raw, "raw"),
        ("vmdk", secret.image("vmdk"), "vmdk"),
    ):
        data = forged.overlay(directory / "seed", image_format, base, kind)
        images.append((f"{image_format}, overlay", image_format, data))
    for title, image_format, data in images:
        yield Seed(name=title, format=image_format, data=data, names_a_secret=True)


def corrupted(all_of_them: tuple[Seed, ...], seed: int, number: int) -> Corrupted:
    """The image of that number."""
    pick = random.Random(f"{seed}:{number}")  # noqa: S311 - to be repeated
    begun = all_of_them[number % len(all_of_them)]
    data = bytearray(begun.data)
    slots = begun.structures() or [0]
    for _ in range(pick.choice((1, 1, 2, 4, 8, 32))):
        _spoil(pick, data, slots, all_of_them)
    if pick.random() < 0.9:
        begun.repair(data)
    return Corrupted(seed=begun, number=number, data=bytes(data))


def _spoil(
    pick: random.Random, data: bytearray, slots: list[int], others: tuple[Seed, ...]
) -> None:
    # Half of it in the first piece, where the header is.
    piece = slots[0] if pick.random() < 0.5 else pick.choice(slots)
    at = min(piece + pick.randrange(TABLE_BYTES), max(len(data) - 8, 0))
    width = pick.choice(tuple(WIDTHS))
    order = pick.choice("<>")
    match pick.randrange(8):
        case 0:
            data[at : at + 1] = bytes([(data[at] if data else 0) ^ 1 << pick.randrange(8)])
        case 1:
            value = pick.choice((*INTERESTING, *EXTREME)) % 256**width
            struct.pack_into(f"{order}{WIDTHS[width]}", data, _fit(data, at, width), value)
        case 2:
            here = _fit(data, at, width)
            (value,) = struct.unpack_from(f"{order}{WIDTHS[width]}", data, here)
            changed = (value + pick.randrange(-35, 36)) % 256**width
            struct.pack_into(f"{order}{WIDTHS[width]}", data, here, changed)
        case 3:
            data[at : at + pick.choice((1, 8, 64))] = pick.randbytes(pick.choice((1, 8, 64)))
        case 4:
            source = pick.choice(slots)
            length = pick.choice((8, 64, TABLE_BYTES))
            data[at : at + length] = data[source : source + length]
        case 5:
            data[at : at + TABLE_BYTES] = bytes(len(data[at : at + TABLE_BYTES]))
        case 6:
            del data[max(16, pick.randrange(len(data) + 1)) :]
            data += bytes(16)
        case 7:
            other = pick.choice(others).data
            length = pick.choice((4, 16, 104, TABLE_BYTES))
            data[at : at + length] = other[at : at + length] or other[:length]


def _fit(data: bytearray, at: int, width: int) -> int:
    if len(data) < width:
        data += bytes(width)
    return min(at, len(data) - width)


# --- checksums -----------------------------------------------------------------------------------


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_TABLE: Final = _crc32c_table()


def _crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def _mend_vhdx(data: bytearray) -> None:
    """Make the checksums of headers and region tables right, or nothing behind them is read."""
    kib = 1024
    for at, length in ((64 * kib, 4 * kib), (128 * kib, 4 * kib)):
        _mend(data, at, length)
    for at in (192 * kib, 256 * kib):
        _mend(data, at, 64 * kib)


def _mend(data: bytearray, at: int, length: int) -> None:
    if len(data) < at + length:
        return
    data[at + 4 : at + 8] = bytes(4)
    struct.pack_into("<I", data, at + 4, _crc32c(bytes(data[at : at + length])))
