"""convertd's performance goals, and whether it meets them."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks import cases, contestants, figures, latency
from benchmarks.contestants import CONVERTD, NOVA_ARGV, SAME_ARGV
from benchmarks.results import Results

KIB_PER_MIB: Final = 1024

LONG_S: Final = 1.0
"""The least time of a conversion in which the daemon's fixed cost is small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A figure, and where it was found if it is the worst of several."""

    value: float
    where: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A limit that a figure must not exceed. `measure` raises LookupError if there is none."""

    text: str
    limit: float
    unit: str = ""
    measure: Callable[[Results], Measured]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A goal and its measured figure, or the reason why there is none."""

    goal: Goal
    measured: Measured | None
    reason: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the goal was achieved. What was not measured was not."""
        return self.measured is not None and self.measured.value <= self.goal.limit


def verdicts(results: Results) -> list[Verdict]:
    """Compare all goals with the results."""
    return [_verdict(goal, results) for goal in GOALS]


def _verdict(goal: Goal, results: Results) -> Verdict:
    try:
        return Verdict(goal=goal, measured=goal.measure(results))
    except LookupError as error:
        return Verdict(goal=goal, measured=None, reason=str(error))


def _worst(found: Iterable[tuple[float, str]]) -> Measured:
    try:
        value, where = max(found)
    except ValueError:
        raise LookupError("nothing was measured") from None
    return Measured(value=value, where=where)


def _ratio(results: Results, case: str, base: str) -> float:
    ours, theirs = (figures.entry(results, case, name) for name in (CONVERTD, base))
    return figures.ratio(ours, theirs).median


def _of_row(row: str, base: str) -> Callable[[Results], Measured]:
    case = cases.name(row, cases.OWN)
    return lambda results: Measured(value=_ratio(results, case, base))


def _worst_of(names: Sequence[str], base: str) -> Callable[[Results], Measured]:
    return lambda results: _worst((_ratio(results, case, base), case) for case in names)


SHARED_WARM: Final = tuple(
    cases.name(row.name, disk) for disk in cases.SHARING for row in cases.SHARED if row.warm
)
SHARED_COLD: Final = tuple(
    cases.name(row.name, disk) for disk in cases.SHARING for row in cases.SHARED if not row.warm
)


EXTENTS: Final = (cases.LARGE_EXTENTS, cases.SMALL_EXTENTS)


def _more_data(results: Results) -> Measured:
    """The time for ten times the data in as many extents, over that for the first."""
    pairs = [
        (cases.name(row.name, disk), cases.name(row.name.replace(*EXTENTS), disk))
        for disk in cases.SHARING
        for row in cases.EXTENTS
        if row.name.startswith(cases.LARGE_EXTENTS)
    ]
    return _worst(
        (
            figures.ratio(
                figures.entry(results, large, CONVERTD), figures.entry(results, small, CONVERTD)
            ).median,
            large,
        )
        for large, small in pairs
    )


def _not_copied(results: Results) -> Measured:
    """How much of the data came into the page cache, or was written, where it is to be shared."""
    return _worst(
        (figures.percent_of_data(results, case, operator.attrgetter(figure)), f"{text}, {case}")
        for case in (*SHARED_WARM, *SHARED_COLD)
        for figure, text in (("cached_bytes", "page cache"), ("written_bytes", "written"))
    )


COPYING: Final = frozenset(
    cases.name(row.name, disk) for disk in cases.PLAIN for row in cases.COPYING
)


def _buffered(results: Results) -> Measured:
    """The worst of some rows, on disks that are faster through the page cache than past it."""
    names = [
        cases.name(row, disk.name)
        for disk in results.disks
        if disk.name in cases.PLAIN
        and 1 / disk.buffered_read + 1 / disk.buffered_write
        < 1 / disk.direct_read + 1 / disk.direct_write
        for row in (cases.FILES_TO_QCOW2, cases.FILES_TO_RAW, cases.RANDOM_TO_RAW)
    ]
    if not names:
        raise LookupError("no disk here is faster through the page cache")
    return _worst((_ratio(results, case, NOVA_ARGV), case) for case in names)


def _over_best_peer(results: Results) -> Measured:
    return _worst(
        (_ratio(results, case, best), f"{case}, {best}")
        for case in _long(results, NOVA_ARGV, COPYING)
        for best in (figures.best_peer(results, case).contestant,)
    )


def _long(results: Results, contestant: str, among: Container[str]) -> list[str]:
    """Those cases in which a contestant takes LONG_S; if none, the longest."""
    medians = {
        one.case: figures.seconds(one).median
        for one in results.entries
        if one.contestant == contestant and one.runs and one.case in among
    }
    least_s = min(LONG_S, max(medians.values(), default=0))
    return [case for case, median in medians.items() if median >= least_s]


def _own_cost(results: Results) -> Measured:
    """Convertd's time over qemu-img's alone: all rounds of all cases in which that takes long."""
    found = [
        one
        for case in _long(results, SAME_ARGV, {one.name for one in results.cases})
        for one in figures.ratios(
            figures.entry(results, case, CONVERTD), figures.entry(results, case, SAME_ARGV)
        )
    ]
    if not found:
        raise LookupError("no conversion took long")
    return Measured(value=statistics.median(found))


def _throughput(results: Results) -> Measured:
    """Convertd's time for so many conversions over that of Nova's helper, in the same round."""
    total = {
        name: [one for one in results.throughputs if one.contestant == name]
        for name in (CONVERTD, contestants.Nova.name)
    }
    found: dict[int, list[float]] = {}
    for ours, theirs in zip(*total.values(), strict=True):
        found.setdefault(ours.callers, []).append(ours.total_s / theirs.total_s)
    return _worst(
        (statistics.median(ratios), "1 caller" if callers == 1 else f"{callers} callers")
        for callers, ratios in found.items()
    )


def _clone_ms(results: Results) -> Measured:
    ours = figures.entry(results, cases.name(cases.CLONE, cases.XFS), CONVERTD)
    return Measured(value=figures.seconds(ours).median * 1000)


def _cached(results: Results) -> Measured:
    """The growth of the page cache in the worst of the large conversions."""
    names = [
        cases.name(row, cases.OWN)
        for row in (cases.FILES_TO_RAW, cases.FILES_TO_QCOW2, cases.RANDOM)
    ]
    figure = operator.attrgetter("cached_bytes")
    return _worst((figures.percent_of_data(results, case, figure), case) for case in names)


def samples(results: Results, name: str) -> list[float]:
    """The measured times of calls.

    Raises:
        LookupError: they were not measured.
    """
    for one in results.latencies:
        if one.name == name:
            return one.seconds
    raise LookupError(name)


def _busy_over_idle(results: Results) -> Measured:
    busy, idle = (
        figures.percentile(samples(results, name), 99) for name in (latency.BUSY, latency.IDLE)
    )
    return Measured(value=busy / idle)


def _cold_start(results: Results) -> Measured:
    return Measured(value=statistics.median(samples(results, latency.COLD_START)))


def _idle_mib(results: Results) -> Measured:
    """All processes together, when there were most."""
    if not results.memory:
        raise LookupError("memory was not measured")
    fresh = sum(one.fresh_pss_kib for one in results.memory)
    used = sum(one.used_pss_kib for one in results.memory)
    return Measured(value=max(fresh, used) / KIB_PER_MIB)


NOVA: Final = "Nova's arguments"

GOALS: Final = (
    Goal(
        text=f"4 GiB with 700 MiB of files, raw and qcow2 and a chain of 3, to qcow2 and to raw, "
        f"on XFS and btrfs ÷ {NOVA}, warm",
        limit=0.12,
        measure=_worst_of(SHARED_WARM, NOVA_ARGV),
    ),
    Goal(
        text="the same, cold",
        limit=0.06,
        measure=_worst_of(SHARED_COLD, NOVA_ARGV),
    ),
    Goal(
        text="10 times the data in as many extents ÷ the time for the first, on XFS and btrfs",
        limit=2,
        measure=_more_data,
    ),
    Goal(
        text="growth of the page cache, and bytes written, of the data, on XFS and btrfs",
        limit=1,
        unit=" %",
        measure=_not_copied,
    ),
    Goal(
        text="copying conversions of over a second ÷ the fastest other contestant, on each disk",
        limit=1.05,
        measure=_over_best_peer,
    ),
    Goal(
        text=f"files, raw → qcow2 and qcow2 → raw, and random bytes, raw → raw ÷ {NOVA}, "
        "on a disk that fio finds faster through the page cache",
        limit=0.65,
        measure=_buffered,
    ),
    Goal(
        text="many conversions of 1 MiB by 1, 8 and 64 callers ÷ Nova's helper",
        limit=1.0,
        measure=_throughput,
    ),
    Goal(
        text="conversions of over a second ÷ qemu-img alone with the same arguments",
        limit=1.02,
        measure=_own_cost,
    ),
    Goal(
        text="compressed qcow2 → raw on XFS, where nothing can be shared ÷ the same without trying",
        limit=1.02,
        measure=_worst_of([cases.name(cases.COMPRESSED, cases.XFS)], contestants.CONVERTD_COPYING),
    ),
    Goal(
        text=f"1 MiB raw → qcow2 ÷ qemu-img alone, with {NOVA}",
        limit=1.4,
        measure=_of_row(cases.TINY, NOVA_ARGV),
    ),
    Goal(
        text="the same, the source's format not stated",
        limit=1.9,
        measure=_of_row(cases.TINY_UNDECLARED, NOVA_ARGV),
    ),
    Goal(
        text=f"files, qcow2 → raw ÷ {NOVA}, on the own disk",
        limit=0.65,
        measure=_of_row(cases.FILES_TO_RAW, NOVA_ARGV),
    ),
    Goal(
        text="compressed by zstd ÷ Nova's `-c`",
        limit=0.17,
        measure=_of_row(cases.ZSTD, NOVA_ARGV),
    ),
    Goal(
        text="compressed by zlib ÷ Nova's `-c`",
        limit=0.55,
        measure=_of_row(cases.ZLIB, NOVA_ARGV),
    ),
    Goal(
        text="almost empty disk, raw → raw on XFS",
        limit=50,
        unit=" ms",
        measure=_clone_ms,
    ),
    Goal(
        text="random bytes to qcow2 and to raw ÷ fio for the same bytes",
        limit=1.3,
        measure=_worst_of(
            [cases.name(row, cases.OWN) for row in (cases.RANDOM, cases.RANDOM_TO_RAW)],
            contestants.FIO,
        ),
    ),
    Goal(
        text="GetAccess, 99th percentile: all job slots busy ÷ idle",
        limit=2,
        measure=_busy_over_idle,
    ),
    Goal(
        text="growth of the page cache by large conversions that copy, of the data",
        limit=5,
        unit=" %",
        measure=_cached,
    ),
    Goal(
        text="cold start to the first answer",
        limit=0.4,
        unit=" s",
        measure=_cold_start,
    ),
    Goal(
        text="memory (PSS) of all processes, idle",
        limit=70,
        unit=" MiB",
        measure=_idle_mib,
    ),
)
