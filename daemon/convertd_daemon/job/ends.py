"""The two ends of a conversion, open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convertd_daemon.job.paths import Source, Target
    from convertd_daemon.job.result import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """What is read, what is written, and where that will appear."""

    source: Source
    result: Result
    target: Target
