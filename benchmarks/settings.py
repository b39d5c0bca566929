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
    and of almost empty images. `patience` is how many seconds disks are given to come to rest.
    """

    name: str
    files_disk_mib: int
    files_mib: int
    packed_disk_mib: int
    packed_mib: int
    noise_mib: int
    empty_disk_mib: int
    large_rounds: int
    small_rounds: int
    answers: int
    starts: int
    traces: int
    callers: tuple[int, ...]
    calls: int
    patience: int


FULL: Final = Settings(
    name="full",
    files_disk_mib=4096,
    files_mib=700,
    packed_disk_mib=1024,
    packed_mib=175,
    noise_mib=1024,
    empty_disk_mib=20480,
    large_rounds=3,
    small_rounds=20,
    answers=1000,
    starts=7,
    traces=15,
    callers=(1, 8, 64),
    calls=128,
    patience=30,
)

SMOKE: Final = Settings(
    name="smoke",
    files_disk_mib=64,
    files_mib=6,
    packed_disk_mib=32,
    packed_mib=3,
    noise_mib=8,
    empty_disk_mib=512,
    large_rounds=1,
    small_rounds=1,
    answers=20,
    starts=1,
    traces=1,
    callers=(1, 8),
    calls=8,
    patience=0,
)
