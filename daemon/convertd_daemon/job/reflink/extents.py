"""Where the bytes of a disk lie: what a map is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A stretch of a disk: data at `offset_bytes` of a member's file, or zeroes.

    `member` counts down the backing chain; 0 is the source itself. `offset_bytes` None means that
    the stretch reads as zero.
    """

    start_bytes: int
    length_bytes: int
    member: int = 0
    offset_bytes: int | None = None

    @property
    def end_bytes(self) -> int:
        """The first byte of the disk after it."""
        return self.start_bytes + self.length_bytes
