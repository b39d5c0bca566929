"""The options with which an image of a format is created: which there are, and what they may be.

Pure. What is not in this table never reaches qemu-img's `-o`: the front that sends options may have
been taken over, and one such as qcow2's `backing_file` or `data_file` names another file.

An option has qemu's name, and its value qemu's spelling. The contract's are others in places: see
`field_of` and `contract_choice`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from convertd_core import conditions, values

Value = int | str | bool
"""What a caller in Python gives for an option."""

KIB: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What an option takes: one of `choices`, a number up to `most`, or else yes or no.

    `refused` are choices of qemu's that convertd knows and does not do. `largest` is what the
    contract's field holds.
    """

    choices: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    largest: int = 0
    least: int = 0
    most: int = 0
    multiple_of: int = 1
    power_of_two: bool = False

    @property
    def known(self) -> tuple[str, ...]:
        """The choices that the contract has, those included that convertd does not do."""
        return (*self.choices, *self.refused)

    def accepts(self, value: str) -> bool:
        """Whether a value in qemu's spelling is possible."""
        if not self.most:
            return value in (self.choices or ("on", "off"))
        if not _NUMBER.fullmatch(value):
            return False
        number = int(value)
        fits = self.least <= number <= self.most and number % self.multiple_of == 0
        return fits and (number.bit_count() == 1 or not self.power_of_two)

    def problem_of(self, value: object) -> str:
        """Why a request can't hold a value; empty if it can. The daemon checks the rest."""
        if self.choices:
            possible = ", ".join(self.known)
            return "" if value in self.known else f"{value!r} is not one of {possible}"
        if self.largest:
            fits = type(value) is int and 0 <= value <= self.largest
            return "" if fits else f"{value!r} is not a number from 0 to {self.largest}"
        return "" if isinstance(value, bool) else f"{value!r} is neither True nor False"


_NUMBER: Final = re.compile("[0-9]{1,12}")

_FLAG: Final = Option()
_DYNAMIC_OR_FIXED: Final = Option(choices=("dynamic", "fixed"))


def _bytes(least: int, most: int, *, multiple_of: int = 1, power_of_two: bool = False) -> Option:
    return Option(
        largest=2**64 - 1,
        least=least,
        most=most,
        multiple_of=multiple_of,
        power_of_two=power_of_two,
    )


def _count(least: int, most: int, *, power_of_two: bool = False) -> Option:
    return Option(largest=2**32 - 1, least=least, most=most, power_of_two=power_of_two)


OPTIONS: Final[Mapping[str, Mapping[str, Option]]] = {
    "qcow2": {
        "cluster_size": _bytes(512, 2 * values.MIB, power_of_two=True),
        "compat": Option(choices=("0.10", "1.1")),
        "lazy_refcounts": _FLAG,
        "refcount_bits": _count(1, 64, power_of_two=True),
        "extended_l2": _FLAG,
    },
    "vmdk": {
        "subformat": Option(
            choices=("monolithicSparse", "streamOptimized"),
            # Their images are several files.
            refused=("monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"),
        ),
        "adapter_type": Option(choices=("ide", "lsilogic", "buslogic", "legacyESX")),
        "hwversion": _count(1, 99),
        "zeroed_grain": _FLAG,
    },
    "vdi": {"static": _FLAG},
    "vpc": {"subformat": _DYNAMIC_OR_FIXED},
    "vhdx": {
        "subformat": _DYNAMIC_OR_FIXED,
        "block_size": _bytes(values.MIB, 256 * values.MIB, power_of_two=True),
        "log_size": _bytes(values.MIB, 4 * KIB * values.MIB - 1, multiple_of=values.MIB),
    },
    "qed": {
        "cluster_size": _bytes(4 * KIB, 64 * values.MIB, power_of_two=True),
        # qemu takes a table of one cluster, and does not open what it made. Source: block/qed.h,
        # qed_check_table_offset().
        "table_size": _count(2, 16, power_of_two=True),
    },
    "parallels": {"cluster_size": _bytes(512, 256 * values.MIB, multiple_of=512)},
}
"""By format and by qemu's name of the option. Source: qemu-img create -f FORMAT -o help."""

NAMES: Final = frozenset(name for options in OPTIONS.values() for name in options)

_FIELDS: Final = {
    "cluster_size": "cluster_size_bytes",
    "block_size": "block_size_bytes",
    "log_size": "log_size_bytes",
    "table_size": "table_size_clusters",
    "hwversion": "hardware_version",
}
_CHOICES: Final = {"0.10": "V2", "1.1": "V3"}


def field_of(name: str) -> str:
    """The contract's name of an option."""
    return _FIELDS.get(name, name)


def contract_choice(choice: str) -> str:
    """The contract's name of a choice, without the enum's prefix: `streamOptimized` in capitals."""
    return _CHOICES.get(choice) or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", choice).upper()


def qemu_value(value: Value) -> str:
    """A value in qemu's spelling. False is never passed: it is qemu's default."""
    return "on" if value is True else str(value)


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
        option = known.get(name)
        if option is not None and value in option.refused:
            raise conditions.Unsupported(what=f"{name} {value}", why="its image is several files")
        if option is None or not option.accepts(value):
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
    if not 1 <= asked.iter_time_milliseconds <= MAX_ITER_TIME_MS:
        problem = f"must be 1 to {MAX_ITER_TIME_MS}"
        raise conditions.BadOption(field="dest.encryption.iter_time_milliseconds", problem=problem)
