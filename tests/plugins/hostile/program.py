"""A program in the place of qemu-img, as if an image had taken it over: it says what it is told to.

A static ELF file of a few instructions, made here: it needs no library, no file and no compiler.
"""

from __future__ import annotations

import platform
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MACHINE: Final = "x86_64"

_BASE: Final = 0x400000
_HEADERS: Final = 64 + 56
_STDOUT: Final = 1
_STDERR: Final = 2


def fits() -> bool:
    """Whether such a program runs here."""
    return platform.machine() == MACHINE


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What it does: says something once or for ever, and exits, or never does."""

    out: bytes = b""
    err: bytes = b""
    status: int = 0
    repeats: bool = False
    hangs: bool = False


def write(
    path: Path, *, info: Behaviour, otherwise: Behaviour, mapped: Behaviour | None = None
) -> None:
    """Put the program where qemu-img is looked for.

    It tells `qemu-img info` from all else, and `qemu-img map` too if it is to say something of its
    own there.
    """
    asked = {"i": info, **({"m": mapped} if mapped else {})}
    new = path.with_suffix(".new")
    new.write_bytes(_elf(asked, otherwise))
    new.chmod(0o755)
    new.rename(path)


def _elf(asked: dict[str, Behaviour], otherwise: Behaviour) -> bytes:
    behaviours = (*asked.values(), otherwise)
    # The second argument's address, and then for each letter: if it begins otherwise, on to the
    # behaviour after the next.
    start = b"\x48\x8b\x44\x24\x10"
    chosen = [
        b"\x80\x38" + letter.encode() + b"\x0f\x85" + struct.pack("<i", len(_code(behaviour, 0)))
        for letter, behaviour in asked.items()
    ]
    chosen.append(b"")
    lengths = [len(_code(behaviour, 0)) for behaviour in behaviours]
    data_at = _HEADERS + len(start) + len(b"".join(chosen)) + sum(lengths)
    code = start
    for choice, behaviour in zip(chosen, behaviours, strict=True):
        code += choice + _code(behaviour, _BASE + data_at)
        data_at += len(behaviour.out) + len(behaviour.err)
    data = b"".join(text for one in behaviours for text in (one.out, one.err))
    total = _HEADERS + len(code) + len(data)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    entry = _BASE + _HEADERS
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, total, total, 0x1000)
    return header + segment + code + data


def _code(behaviour: Behaviour, data: int) -> bytes:
    out = _write(_STDOUT, data, len(behaviour.out))
    err = _write(_STDERR, data + len(behaviour.out), len(behaviour.err))
    if behaviour.hangs:
        return out + err + b"\xeb\xfe"
    if behaviour.repeats:
        both = out + err
        return both + b"\xe9" + struct.pack("<i", -len(both) - 5)
    # The call is exit_group(2).
    return out + err + b"\xb8\xe7\0\0\0\xbf" + struct.pack("<i", behaviour.status) + b"\x0f\x05"


def _write(descriptor: int, address: int, length: int) -> bytes:
    """write(2), as often as it takes: a pipe takes a part of what is long."""
    begin = (
        *(b"\x48\xbe", struct.pack("<Q", address)),
        *(b"\x48\xbb", struct.pack("<Q", length)),
    )
    # While rbx is positive: write(fd, rsi, rbx), and take from both what was written.
    body = b"\xb8\1\0\0\0\xbf" + struct.pack("<i", descriptor)
    body += b"\x48\x89\xda\x0f\x05\x48\x01\xc6\x48\x29\xc3"
    loop = b"\x48\x85\xdb\x7e" + bytes([len(body) + 2]) + body
    return b"".join(begin) + loop + b"\xeb" + struct.pack("<b", -len(loop) - 2)
