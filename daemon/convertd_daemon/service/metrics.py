"""What the daemon counts, for GetStats and for node_exporter's text-file collector."""

from __future__ import annotations

import bisect
import collections
import datetime
import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from convertd_core import messages, results
from convertd_daemon.service import audit

if TYPE_CHECKING:
    from collections.abc import Iterator

BOUNDS_S: Final = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0)
"""The upper bounds of the buckets of running times; one more has none."""

INTERVAL_S: Final = 15.0
"""How often the file is written."""


class Kind(NamedTuple):
    """What is counted together: conversions of these formats, with this end, by this method."""

    source_format: str
    dest_format: str
    reason: str
    method: results.Method | None


@dataclass(slots=True, kw_only=True)
class Ended:
    """Conversions that are counted together. Each bucket counts its own."""

    count: int = 0
    virtual_bytes: int = 0
    shared_bytes: int = 0
    seconds: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """Each bound, the last infinite, with how many running times are not above it."""
        return zip((*BOUNDS_S, math.inf), itertools.accumulate(self.buckets), strict=True)


class Counters:
    """Counts since the daemon's start. Nothing that a caller can invent becomes a label."""

    def __init__(self) -> None:
        self.start_time = datetime.datetime.now(datetime.UTC)
        self.conversions: dict[Kind, Ended] = collections.defaultdict(Ended)
        self.refusals: collections.Counter[str] = collections.Counter()

    def count(self, record: audit.Record) -> None:
        """Count one request."""
        if record.outcome is audit.Outcome.REFUSED:
            self.refusals[record.reason] += 1
        elif record.asked.operation is messages.Operation.CONVERT:
            found = record.found
            formats = (record.source_format, record.asked.dest_format)
            ended = self.conversions[Kind(*formats, record.reason, found.method)]
            seconds = record.seconds or 0.0
            ended.count += 1
            ended.virtual_bytes += found.virtual_size_bytes
            ended.shared_bytes += found.shared_bytes
            ended.seconds += seconds
            ended.buckets[bisect.bisect_left(BOUNDS_S, seconds)] += 1

    def messages(self) -> Iterator[messages.ReplyBody]:
        """The counts, as sent to the front."""
        for kind, ended in self.conversions.items():
            yield messages.ConversionStats(
                **kind._asdict(),
                count=ended.count,
                bytes=ended.virtual_bytes,
                shared_bytes=ended.shared_bytes,
                seconds=ended.seconds,
                durations=tuple(
                    messages.HistogramBucket(upper_bound_seconds=bound, count=count)
                    for bound, count in ended.cumulative()
                ),
            )
        for reason, count in self.refusals.items():
            yield messages.RefusalStats(reason=reason, count=count)
