"""Summarize measurements: medians and their quartiles, and ratios of contestants."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks import contestants
from benchmarks.results import Entry, Results, Run

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


def entry(results: Results, case: str, contestant: str) -> Entry:
    """A contestant's runs of a case.

    Raises:
        LookupError: it took no part, or failed.
    """
    for one in results.entries:
        if (one.case, one.contestant) == (case, contestant):
            if one.failure:
                raise LookupError(f"{contestant} failed in {case}")
            return one
    raise LookupError(f"{contestant} took no part in {case}")


def peers(results: Results, case: str) -> list[Entry]:
    """Those whom convertd is to be compared with in a case, the fastest first."""
    found = [
        one
        for one in results.entries
        if one.case == case and one.runs and one.contestant not in contestants.NOT_PEERS
    ]
    return sorted(found, key=lambda one: seconds(one).median)


def best_peer(results: Results, case: str) -> Entry:
    """The fastest of those whom convertd is to be compared with.

    Raises:
        LookupError: there is none.
    """
    found = peers(results, case)
    if not found:
        raise LookupError(f"nobody else converted {case}")
    return found[0]


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


def percent_of_data(results: Results, case: str, figure: Callable[[Run], int]) -> float:
    """The median of a figure of convertd's runs, in bytes, of the data that were converted.

    Raises:
        LookupError: there are no such runs.
    """
    ours = entry(results, case, contestants.CONVERTD)
    (data_bytes,) = [one.data_bytes for one in results.cases if one.name == case]
    return statistics.median(figure(run) for run in ours.runs) / data_bytes * HUNDRED
