"""The file that is being written, before it has its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convertd_core import values
    from convertd_daemon.job.files.ownership import Ownership
    from convertd_daemon.job.files.paths import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFile:
    """The inode being written, open for reading and writing since before qemu-img started.

    Only such a descriptor is told of every write that failed: an error of writeback is reported to
    the descriptors that were open at the time. Source: fsync(2), Linux errseq_t.

    `target` is where it will appear, `temporary` its name until then, empty if it has none.
    `ownership` is the owner and the mode that it gets in the end.
    """

    target: Target
    fd: int
    temporary: str
    ownership: Ownership

    @property
    def place(self) -> values.Place:
        """Where it will appear, as the caller named it."""
        return self.target.place
