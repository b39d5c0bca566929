"""How small and how large an image of a format can be, by the options with which it is made.

Pure. qemu-img finds out as it creates the result, or not before it opens it again, and each format
says it in other words, if it says it. Source: qemu's block drivers, and tried with qemu-img 7.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from convertd_core import conditions, values

SECTOR_BYTES: Final = 512
KIB: Final = 1024
TIB: Final = 1024**4

MAX_BYTES: Final = 2**63 - SECTOR_BYTES
"""What off_t holds, in sectors."""

Options = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The least and the most that the virtual size may be, in bytes."""

    least_bytes: int = 0
    most_bytes: int = MAX_BYTES


def check(path: str, dest: values.Destination, size_bytes: int) -> None:
    """Hold a virtual size against what the destination's format and options can have.

    Raises:
        conditions.SizeNotPossible: it is too small or too large for them.
    """
    possible = sizes(dest)
    if not possible.least_bytes <= size_bytes <= possible.most_bytes:
        raise conditions.SizeNotPossible(
            path=path,
            format=dest.format,
            size_bytes=size_bytes,
            least_bytes=possible.least_bytes,
            most_bytes=possible.most_bytes,
        )


def sizes(dest: values.Destination) -> Sizes:
    """The sizes that are possible with a format and its options."""
    options = {option.name: option.value for option in dest.options}
    of_format = _SIZES.get(dest.format)
    return of_format(options) if of_format else Sizes()


def _qcow2(options: Options) -> Sizes:
    """The first table, of 8 bytes for each table below it, has 32 MiB. Source: block/qcow2.h."""
    cluster = int(options.get("cluster_size", 64 * KIB))
    entry = 16 if options.get("extended_l2") == "on" else 8
    tables = 32 * values.MIB // 8
    return Sizes(most_bytes=min(tables * (cluster // entry) * cluster, MAX_BYTES))


def _vmdk(_options: Options) -> Sizes:
    """Grains of 64 KiB, rounded up to whole tables in 32 bits: beyond that qemu makes too few.

    Without a word: it writes beyond them, says 0, and reads zeroes there. Source: block/vmdk.c,
    vmdk_init_extent().
    """
    return Sizes(least_bytes=SECTOR_BYTES, most_bytes=(2**32 - 512) * 64 * KIB)


def _vdi(_options: Options) -> Sizes:
    """The table of blocks of 1 MiB stays below 2 GiB. Source: block/vdi.c."""
    return Sizes(most_bytes=0x1FFFFF8000000)


def _vpc(options: Options) -> Sizes:
    """2040 GiB, as Virtual PC has it. A fixed one of no size is read as a dynamic one."""
    fixed = options.get("subformat") == "fixed"
    least = SECTOR_BYTES if fixed else 0
    return Sizes(least_bytes=least, most_bytes=0xFF000000 * SECTOR_BYTES)


def _vhdx(_options: Options) -> Sizes:
    """64 TiB, as the specification has it."""
    return Sizes(most_bytes=64 * TIB)


def _qed(options: Options) -> Sizes:
    """Two levels of tables of one length. qemu multiplies in 64 bits, and 2^64 is 0 there."""
    cluster = int(options.get("cluster_size", 64 * KIB))
    entries = int(options.get("table_size", 4)) * cluster // 8
    return Sizes(most_bytes=min(entries * entries * cluster % 2**64, MAX_BYTES))


def _parallels(options: Options) -> Sizes:
    """One table of 4 bytes for each cluster, which is read at once: 2 GiB, less a page."""
    cluster = int(options.get("cluster_size", values.MIB))
    return Sizes(most_bytes=(2**31 - values.MIB) // 4 * cluster)


_SIZES: Final[Mapping[str, Callable[[Options], Sizes]]] = {
    "qcow2": _qcow2,
    "vmdk": _vmdk,
    "vdi": _vdi,
    "vpc": _vpc,
    "vhdx": _vhdx,
    "qed": _qed,
    "parallels": _parallels,
}
"""By format. Of one that is not listed (raw, luks) only the file system bounds the size."""
