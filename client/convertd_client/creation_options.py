"""The options with which an image of a format is created, by qemu's names, and their kinds.

Which there are is the contract's to say. What their values may be is the daemon's to judge; here is
only what the contract's fields can hold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

Value = int | str | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What an option takes: one of `choices`, a number up to `largest`, or else yes or no."""

    choices: tuple[str, ...] = ()
    largest: int = 0

    def problem_of(self, value: object) -> str:
        """What is wrong with a value; empty if nothing is."""
        if self.choices:
            possible = ", ".join(self.choices)
            return "" if value in self.choices else f"{value!r} is none of {possible}"
        if self.largest:
            fits = type(value) is int and 0 <= value <= self.largest
            return "" if fits else f"{value!r} is not a number from 0 to {self.largest}"
        return "" if isinstance(value, bool) else f"{value!r} is neither True nor False"


_FLAG: Final = Kind()
_BYTES: Final = Kind(largest=2**64 - 1)
_NUMBER: Final = Kind(largest=2**32 - 1)
_GROWING_OR_NOT: Final = Kind(choices=("dynamic", "fixed"))

OPTIONS: Final[Mapping[str, Mapping[str, Kind]]] = {
    "qcow2": {
        "cluster_size": _BYTES,
        "compat": Kind(choices=("0.10", "1.1")),
        "lazy_refcounts": _FLAG,
        "refcount_bits": _NUMBER,
        "extended_l2": _FLAG,
    },
    "vmdk": {
        "subformat": Kind(
            choices=(
                *("monolithicSparse", "streamOptimized"),
                *("monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"),
            )
        ),
        "adapter_type": Kind(choices=("ide", "lsilogic", "buslogic", "legacyESX")),
        "hwversion": _NUMBER,
        "zeroed_grain": _FLAG,
    },
    "vdi": {"static": _FLAG},
    "vpc": {"subformat": _GROWING_OR_NOT},
    "vhdx": {"subformat": _GROWING_OR_NOT, "block_size": _BYTES, "log_size": _BYTES},
    "qed": {"cluster_size": _BYTES, "table_size": _NUMBER},
    "parallels": {"cluster_size": _BYTES},
}
"""By format. A value of 0, or False, is the same as none: qemu's own default."""

NAMES: Final = frozenset(name for options in OPTIONS.values() for name in options)

_FIELDS: Final = {
    "cluster_size": "cluster_size_bytes",
    "block_size": "block_size_bytes",
    "log_size": "log_size_bytes",
    "table_size": "table_size_clusters",
    "hwversion": "hardware_version",
}
_VALUES: Final = {"0.10": "V2", "1.1": "V3"}


def field_of(name: str) -> str:
    """The contract's name of an option."""
    return _FIELDS.get(name, name)


def contract_value(choice: str) -> str:
    """The contract's name of a choice, without the enum's prefix: `streamOptimized` in capitals."""
    return _VALUES.get(choice) or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", choice).upper()


def qemu_value(value: Value) -> str:
    """A value in qemu's own words. False is not said: see OPTIONS."""
    return "on" if value is True else str(value)
