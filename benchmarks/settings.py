"""How large the images are, and how often everything is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MIB: Final = 1024 * 1024
GIB: Final = 1024 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sizes in MiB, and numbers of rounds.

    `large_rounds` is for conversions that take a second or more, `small_rounds` for those of tiny
    and of almost empty images. `idle_timeout` is how many seconds to wait until disks are idle.
    """

    name: str
    files_disk_mib: int
    files_mib: int
    packed_disk_mib: int
    packed_mib: int
    random_mib: int
    empty_disk_mib: int
    extents: int
    extent_mib: int
    large_rounds: int
    small_rounds: int
    access_calls: int
    starts: int
    traces: int
    callers: tuple[int, ...]
    calls: int
    caller_rounds: int
    idle_timeout: int


FULL: Final = Settings(
    name="full",
    files_disk_mib=4096,
    files_mib=700,
    packed_disk_mib=1024,
    packed_mib=175,
    random_mib=1024,
    empty_disk_mib=20480,
    extents=10,
    extent_mib=7,
    large_rounds=3,
    small_rounds=15,
    access_calls=1000,
    starts=7,
    traces=15,
    callers=(1, 8, 64),
    calls=128,
    caller_rounds=3,
    idle_timeout=30,
)

SMOKE: Final = Settings(
    name="smoke",
    files_disk_mib=64,
    files_mib=12,
    packed_disk_mib=32,
    packed_mib=3,
    random_mib=12,
    empty_disk_mib=512,
    extents=2,
    extent_mib=1,
    large_rounds=1,
    small_rounds=1,
    access_calls=20,
    starts=1,
    traces=1,
    callers=(1, 8),
    calls=8,
    caller_rounds=1,
    idle_timeout=0,
)
