"""An image of the chain, open for reading."""

from __future__ import annotations

from dataclasses import dataclass

from convertd_core import values
from convertd_daemon.linux import statx


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An image, open for reading. `open_source` closes the descriptor.

    `opened` is what a file was when it was opened, before any of it was read: see source_change.
    """

    place: values.Place
    fd: int
    size_bytes: int
    allocated_bytes: int
    opened: statx.Content | None = None
