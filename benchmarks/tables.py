"""The page's tables, but for those that compare conversions."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from benchmarks import cases, figures, latency
from benchmarks.results import DiskInfo, Results, Throughput

MIB = 1024 * 1024

Rows = Sequence[Sequence[str]]


def table(head: Sequence[str], rows: Rows) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def contestants(results: Results) -> str:
    """Who takes part."""
    rows = [(one.name, one.description) for one in results.contestants]
    return table(("contestant", "what it is"), rows)


def machine(results: Results) -> str:
    """What was measured on."""
    described = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in described.versions.items())
    rows = (
        ("processors", f"{described.cores} of {described.cpu}"),
        ("memory", f"{described.memory_mib} MiB"),
        ("system", f"{described.system}, Linux {described.kernel}"),
        ("load before", f"{described.load:.2f} (above 0.5 all figures are less reliable)"),
        ("taken by its host", f"{results.stolen:.1%} of the processors' time meanwhile"),
        ("versions", versions),
    )
    return table(("", ""), rows)


def disks(results: Results) -> str:
    """The disks, and fio's figures for them."""
    head = ("disk", "what it is", "file system", *_DISK_FIGURES)
    return table(head, [_disk(one) for one in results.disks])


_DISK_FIGURES = ("read direct", "written direct", "read buffered", "written buffered")


def _disk(info: DiskInfo) -> tuple[str, ...]:
    rates = (info.direct_read, info.direct_write, info.buffered_read, info.buffered_write)
    shown = (figures.number(rate / MIB) for rate in rates)
    return (info.name, info.description, f"`{info.file_system}`", *shown)


def argv(results: Results) -> str:
    """The daemon's qemu-img commands on the machine's own disk."""
    rows = [
        (case.row, f"`{' '.join(case.argv)}`")
        for case in results.cases
        if case.disk == cases.OWN and case.argv
    ]
    return table(("case", "command"), rows)


def latencies(results: Results) -> str:
    """How soon calls are answered."""
    rows = []
    for one in results.latencies:
        median, most = (figures.percentile(one.seconds, part) * 1000 for part in (50, 99))
        few = one.name == latency.COLD_START
        rows.append((one.name, figures.number(median), "·" if few else figures.number(most)))
    return table(("", "median, ms", "99th percentile, ms"), rows)


def throughputs(results: Results) -> str:
    """Conversions by several callers at once. Each figure is the median of the rounds."""
    ordered = sorted(results.throughputs, key=lambda one: (one.callers, one.contestant))
    groups = itertools.groupby(ordered, key=lambda one: (one.callers, one.contestant))
    rows = [(str(number), name, *_throughput(list(found))) for (number, name), found in groups]
    head = ("callers", "contestant", "conversions a second", "median, ms", "99th percentile, ms")
    return table(head, rows)


def _throughput(rounds: Sequence[Throughput]) -> tuple[str, ...]:
    rate = statistics.median(len(one.seconds) / one.total_s for one in rounds)
    half, most = (
        statistics.median(figures.percentile(one.seconds, part) for one in rounds) * 1000
        for part in (50, 99)
    )
    return figures.number(rate), figures.number(half), figures.number(most)


def memory(results: Results) -> str:
    """The memory of each process."""
    rows = [
        (one.process, str(one.fresh_pss_kib), str(one.used_pss_kib), str(one.peak_kib))
        for one in results.memory
    ]
    fresh = sum(one.fresh_pss_kib for one in results.memory)
    used = sum(one.used_pss_kib for one in results.memory)
    head = ("process", "idle, just started", "idle, after all conversions", "at most")
    return table(head, [*rows, ("all", str(fresh), str(used), "")])


def steps(results: Results) -> str:
    """Where the time of a small conversion goes."""
    rows = [
        (name, figures.number(took), figures.number(at)) for name, took, at in step_times(results)
    ]
    return table(("until", "ms", "since the call"), rows)


def step_times(results: Results) -> list[tuple[str, float, float]]:
    """Each step's end, how long it took and when that was: medians, in milliseconds."""
    traces = results.traces
    first = traces[0].marks if traces else {}
    names = [name for name in first if all(name in trace.marks for trace in traces)]
    found, before = [], 0.0
    for name in names[1:]:
        at = statistics.median(trace.marks[name] for trace in traces)
        found.append((name, at - before, at))
        before = at
    return found
