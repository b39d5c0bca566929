"""Summarize measurements: medians and their quartiles."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.measured import Entry, Results

HUNDRED: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A median, and the quartiles around it: half of all measurements lie between those."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.low)} to {number(self.high)})"


def spread(values: Sequence[float]) -> Spread:
    """The spread of one or more measurements."""
    low, median, high = _quantiles(values, 4)
    return Spread(low=low, median=median, high=high)


def percentile(values: Sequence[float], percent: int) -> float:
    """The value below which so many per cent lie."""
    return _quantiles(values, HUNDRED)[percent - 1]


def _quantiles(values: Sequence[float], parts: int) -> list[float]:
    if len(values) == 1:
        return [values[0]] * (parts - 1)
    return statistics.quantiles(values, n=parts, method="inclusive")


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= HUNDRED else f"{value:#.3g}".rstrip(".")


def find(results: Results, case: str, contestant: str) -> Entry | None:
    """A contestant's runs of a case, or None if it has none."""
    return next(
        (
            entry
            for entry in results.entries
            if (entry.case, entry.contestant) == (case, contestant)
        ),
        None,
    )


def seconds(entry: Entry) -> Spread:
    """How long its runs took."""
    return spread([run.seconds for run in entry.runs])


def ratio(entry: Entry, base: Entry) -> Spread:
    """How much longer one took than another."""
    return spread(ratios(entry, base))


def ratios(entry: Entry, base: Entry) -> list[float]:
    """The same for each round: in one, both saw the same machine."""
    pairs = zip(entry.runs, base.runs, strict=True)
    return [run.seconds / other.seconds for run, other in pairs]
