"""convertd's performance goals, and whether it meets them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from benchmarks import answers, cases, figures
from benchmarks.measured import Entry, Results

KIB_PER_MIB: Final = 1024

A_WHILE_S: Final = 1.0
"""The least time of a conversion in which the daemon's fixed cost is small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A limit that a figure must not exceed."""

    text: str
    limit: float
    unit: str = ""
    measure: Callable[[Results], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A goal and its measured figure."""

    goal: Goal
    measured: float

    @property
    def is_met(self) -> bool:
        """Whether the goal was achieved."""
        return self.measured <= self.goal.limit


def verdicts(results: Results) -> list[Verdict]:
    """Compare all goals with the results."""
    return [Verdict(goal=goal, measured=goal.measure(results)) for goal in GOALS]


def _entry(results: Results, case: str, contestant: str) -> Entry:
    found = figures.find(results, case, contestant)
    if found is None:
        raise LookupError(f"{contestant} took no part in {case}")
    return found


def _ratio(case: str, base: str) -> Callable[[Results], float]:
    def measure(results: Results) -> float:
        ours, theirs = _entry(results, case, "convertd"), _entry(results, case, base)
        return figures.ratio(ours, theirs).median

    return measure


def _own_cost(results: Results) -> float:
    """Convertd's time over qemu-img's alone: all rounds of all cases in which that takes a second.

    Where none does, of the longest.
    """
    alone = [entry for entry in results.entries if entry.contestant == "same argv"]
    medians = [figures.seconds(entry).median for entry in alone]
    least_s = min(A_WHILE_S, max(medians))
    long = [entry for entry, median in zip(alone, medians, strict=True) if median >= least_s]
    return statistics.median(
        one
        for entry in long
        for one in figures.ratios(_entry(results, entry.case, "convertd"), entry)
    )


def _over_fio(results: Results) -> float:
    return max(_ratio(case, "fio")(results) for case in (cases.NOISE, cases.NOISE_TO_RAW))


def _milliseconds(case: str) -> Callable[[Results], float]:
    return lambda results: figures.seconds(_entry(results, case, "convertd")).median * 1000


def _cached_percent(results: Results) -> float:
    """The worst of the large conversions."""
    data_bytes = {case.name: case.data_bytes for case in results.cases}
    return max(
        statistics.median(run.cached_bytes for run in _entry(results, case, "convertd").runs)
        / data_bytes[case]
        * 100
        for case in (cases.FILES_TO_RAW, cases.FILES_TO_QCOW2, cases.NOISE)
    )


def samples(results: Results, name: str) -> list[float]:
    """The measured times of an answer."""
    (found,) = [one.seconds for one in results.answers if one.name == name]
    return found


def _busy_over_idle(results: Results) -> float:
    busy, idle = (
        figures.percentile(samples(results, name), 99) for name in (answers.BUSY, answers.IDLE)
    )
    return busy / idle


def _idle_mib(results: Results) -> float:
    """All processes together, when there were most."""
    fresh = sum(one.fresh_pss_kib for one in results.footprints)
    used = sum(one.used_pss_kib for one in results.footprints)
    return max(fresh, used) / KIB_PER_MIB


GOALS: Final = (
    Goal(
        text="1 MiB raw → qcow2 ÷ qemu-img alone with the same arguments",
        limit=1.4,
        measure=_ratio(cases.TINY, "same argv"),
    ),
    Goal(
        text="the same, the source's format not stated",
        limit=1.9,
        measure=_ratio(cases.TINY_UNDECLARED, "same argv"),
    ),
    Goal(
        text="files, qcow2 → raw ÷ Nova's arguments",
        limit=0.65,
        measure=_ratio(cases.FILES_TO_RAW, "nova argv"),
    ),
    Goal(
        text="compressed by zstd ÷ Nova's `-c`",
        limit=0.17,
        measure=_ratio(cases.ZSTD, "nova argv"),
    ),
    Goal(
        text="compressed by zlib ÷ Nova's `-c`",
        limit=0.55,
        measure=_ratio(cases.ZLIB, "nova argv"),
    ),
    Goal(
        text="almost empty disk, raw → raw on XFS",
        limit=50,
        unit=" ms",
        measure=_milliseconds(cases.CLONE),
    ),
    Goal(
        text="all conversions of over a second ÷ qemu-img alone with the same arguments",
        limit=1.02,
        measure=_own_cost,
    ),
    Goal(
        text="random bytes to qcow2 and to raw, the slower ÷ fio for the same bytes",
        limit=1.3,
        measure=_over_fio,
    ),
    Goal(
        text="GetAccess, 99th percentile: every job slot busy ÷ idle",
        limit=2,
        measure=_busy_over_idle,
    ),
    Goal(
        text="growth of the page cache by large conversions, of what was converted",
        limit=5,
        unit=" %",
        measure=_cached_percent,
    ),
    Goal(
        text="cold start to the first answer",
        limit=0.4,
        unit=" s",
        measure=lambda results: statistics.median(samples(results, answers.COLD_START)),
    ),
    Goal(
        text="memory (PSS) of all processes, idle",
        limit=55,
        unit=" MiB",
        measure=_idle_mib,
    ),
)
