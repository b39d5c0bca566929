"""The options with which an image of a format is created: which there are, and what they may be.

Pure. What is not in these tables never reaches qemu-img's `-o`: the front that sends them may have
been taken over, and an option such as qcow2's `backing_file` or `data_file` names another file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

from convertd_core import conditions, values

Check = Callable[[str], bool]

KIB: Final = 1024


def _one_of(*choices: str) -> Check:
    return lambda value: value in choices


def _number(least: int, most: int, *, multiple_of: int = 1) -> Check:
    def check(value: str) -> bool:
        return (
            _NUMBER.fullmatch(value) is not None
            and least <= int(value) <= most
            and int(value) % multiple_of == 0
        )

    return check


def _power_of_two(least: int, most: int) -> Check:
    within = _number(least, most)
    return lambda value: within(value) and int(value).bit_count() == 1


_NUMBER: Final = re.compile("[0-9]{1,12}")

_ON_OFF: Final = _one_of("on", "off")

OPTIONS: Final[Mapping[str, Mapping[str, Check]]] = {
    "qcow2": {
        "cluster_size": _power_of_two(512, 2 * values.MIB),
        "compat": _one_of("0.10", "1.1"),
        "lazy_refcounts": _ON_OFF,
        "refcount_bits": _power_of_two(1, 64),
        "extended_l2": _ON_OFF,
    },
    "vmdk": {
        "subformat": _one_of("monolithicSparse", "streamOptimized"),
        "adapter_type": _one_of("ide", "lsilogic", "buslogic", "legacyESX"),
        "hwversion": _number(1, 99),
        "zeroed_grain": _ON_OFF,
    },
    "vdi": {"static": _ON_OFF},
    "vpc": {"subformat": _one_of("dynamic", "fixed")},
    "vhdx": {
        "subformat": _one_of("dynamic", "fixed"),
        "block_size": _power_of_two(values.MIB, 256 * values.MIB),
        "log_size": _number(values.MIB, 4 * KIB * values.MIB - 1, multiple_of=values.MIB),
    },
    "qed": {
        "cluster_size": _power_of_two(4 * KIB, 64 * values.MIB),
        # qemu takes a table of one cluster, and does not open what it made. Source: block/qed.h,
        # qed_check_table_offset().
        "table_size": _power_of_two(2, 16),
    },
    "parallels": {"cluster_size": _number(512, 256 * values.MIB, multiple_of=512)},
}
"""By format and by qemu's name of the option. Source: qemu-img create -f FORMAT -o help."""

CIPHERS: Final = {
    "cipher_alg": frozenset(
        f"{cipher}-{bits}"
        for cipher in ("aes", "serpent", "twofish")
        for bits in ("128", "192", "256")
    ),
    "cipher_mode": frozenset({"xts", "cbc", "ecb", "ctr"}),
    "hash_alg": frozenset({"sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160"}),
    "ivgen_alg": frozenset({"plain", "plain64", "essiv"}),
    "ivgen_hash_alg": frozenset({"sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160"}),
}

MAX_ITER_TIME_MS: Final = 60_000

SEVERAL_FILES: Final = frozenset({"monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"})


def check(dest: values.Destination) -> None:
    """Check the creation options of a destination.

    Raises:
        conditions.BadOption: there is no such option, or it has no such value, or does not go with
            another one.
        conditions.Unsupported: a subformat whose image is several files.
    """
    known = OPTIONS.get(dest.format, {})
    named = {option.name: option.value for option in dest.options}
    if len(named) != len(dest.options):
        raise conditions.BadOption(field=f"dest.{dest.format}", problem="has an option twice")
    for name, value in named.items():
        if dest.format == "vmdk" and value in SEVERAL_FILES:
            raise conditions.Unsupported(
                what=f"subformat {value}", why="its image is several files"
            )
        if name not in known or not known[name](value):
            problem = f"can't be {value[:32]!r}"
            raise conditions.BadOption(field=f"dest.{dest.format}.{name[:32]}", problem=problem)
    if dest.format == "qcow2":
        _check_qcow2(dest, named)
    if dest.encryption is not None:
        _check_encryption(dest.encryption)


def _check_qcow2(dest: values.Destination, named: Mapping[str, str]) -> None:
    needs_v3 = {
        "lazy_refcounts": named.get("lazy_refcounts") == "on",
        "refcount_bits": named.get("refcount_bits", "16") != "16",
        "extended_l2": named.get("extended_l2") == "on",
        "compression": dest.compression is values.Compression.ZSTD,
    }
    for name, asked in needs_v3.items():
        if asked and named.get("compat") == "0.10":
            raise conditions.BadOption(field=f"dest.qcow2.{name}", problem="needs compat V3")
    if needs_v3["extended_l2"] and int(named.get("cluster_size", "65536")) < 16 * KIB:
        problem = "needs clusters of at least 16384 bytes"
        raise conditions.BadOption(field="dest.qcow2.extended_l2", problem=problem)


def _check_encryption(asked: values.DestinationEncryption) -> None:
    for name, choices in CIPHERS.items():
        if getattr(asked, name) not in choices:
            problem = f"can't be {getattr(asked, name)[:32]!r}"
            raise conditions.BadOption(field=f"dest.encryption.{name}", problem=problem)
    if not 1 <= asked.iter_time_ms <= MAX_ITER_TIME_MS:
        problem = f"must be 1 to {MAX_ITER_TIME_MS}"
        raise conditions.BadOption(field="dest.encryption.iter_time_milliseconds", problem=problem)
