"""The page's tables and figures that compare contestants' conversions."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Sequence
from typing import Final

from benchmarks import cases, figures
from benchmarks.contestants import CONVERTD, NOVA_ARGV
from benchmarks.plots import Pair
from benchmarks.results import Entry, Results
from benchmarks.tables import MIB, table

NONE: Final = "·"
"""Not measured."""

OVERVIEW: Final = (
    ("qcow2 → raw", cases.FILES_TO_RAW, cases.XFS),
    ("raw → qcow2", cases.FILES_TO_QCOW2, cases.XFS),
    ("with two overlays → qcow2", cases.CHAIN_TO_QCOW2, cases.XFS),
    ("qcow2 → raw", cases.FILES_TO_RAW, cases.OWN),
    ("raw → qcow2", cases.FILES_TO_QCOW2, cases.OWN),
)
"""What the first picture shows."""


def overview(results: Results) -> list[Pair]:
    """The same disk, converted by convertd and by qemu-img as Nova runs it."""
    kinds = {disk.name: disk.file_system.split()[0] for disk in results.disks}
    kinds |= {disk: disk for disk in cases.SHARING}
    return [
        Pair(name=f"{text}, {kinds[disk]}", ours_s=_seconds(ours), theirs_s=_seconds(theirs))
        for text, row, disk in OVERVIEW
        for ours, theirs in _both(results, cases.name(row, disk), NOVA_ARGV)
    ]


def files_disk(results: Results) -> str:
    """What that disk is."""
    rows = (cases.FILES_TO_RAW, cases.FILES_TO_QCOW2)
    return next((case.source for case in results.cases if case.row in rows), "files")


def _both(results: Results, case: str, base: str) -> list[tuple[Entry, Entry]]:
    """The daemon's runs of a case and another's, if there are such."""
    try:
        return [(figures.entry(results, case, CONVERTD), figures.entry(results, case, base))]
    except LookupError:
        return []


def _seconds(entry: Entry) -> float:
    return figures.seconds(entry).median


def sharing(results: Results) -> str:
    """Conversions where blocks can be shared: all disks side by side."""
    head = ["conversion"]
    for disk in cases.SHARING:
        head += [f"{disk}: s", "method", "÷ Nova's", "page cache", "written"]
    rows = [
        [row.name, *(cell for disk in cases.SHARING for cell in _shared(results, row.name, disk))]
        for row in cases.ROWS[cases.XFS]
    ]
    return table(head, rows)


def _shared(results: Results, row: str, disk: str) -> list[str]:
    case = cases.name(row, disk)
    try:
        percents = [
            figures.percent_of_data(results, case, operator.attrgetter(figure))
            for figure in ("cached_bytes", "written_bytes")
        ]
    except LookupError:
        return [_failed_or_none(results, case, CONVERTD), NONE, NONE, NONE, NONE]
    ours = figures.entry(results, case, CONVERTD)
    return [
        figures.number(_seconds(ours)),
        ", ".join(sorted({run.method for run in ours.runs})),
        _ratio_to(results, case, NOVA_ARGV),
        *(f"{figures.number(percent)} %" for percent in percents),
    ]


def copying(results: Results) -> str:
    """Conversions that copy: disks side by side."""
    shown = [disk.name for disk in results.disks if disk.name in cases.PLAIN]
    head = ["conversion"]
    for disk in shown:
        head += [f"{disk}: s", "÷ Nova's", "÷ the fastest other"]
    rows = [
        [row.name, *(cell for disk in shown for cell in _copied(results, row.name, disk))]
        for row in cases.COPYING
    ]
    return table(head, rows)


def _copied(results: Results, row: str, disk: str) -> list[str]:
    case = cases.name(row, disk)
    try:
        ours = figures.entry(results, case, CONVERTD)
        best = figures.best_peer(results, case)
    except LookupError:
        return [_failed_or_none(results, case, CONVERTD), NONE, NONE]
    fastest = f"{_ratio_to(results, case, best.contestant)} ({best.contestant})"
    return [figures.number(_seconds(ours)), _ratio_to(results, case, NOVA_ARGV), fastest]


def _ratio_to(results: Results, case: str, base: str) -> str:
    for ours, theirs in _both(results, case, base):
        return figures.number(figures.ratio(ours, theirs).median)
    return NONE


def _failed_or_none(results: Results, case: str, contestant: str) -> str:
    failed = any(
        one.failure for one in results.entries if (one.case, one.contestant) == (case, contestant)
    )
    return "**failed**" if failed else NONE


def all_contestants(results: Results, disk: str) -> str:
    """All contestants' ratios to Nova's arguments in the cases of a disk."""
    shown_cases = [case for case in results.cases if case.disk == disk]
    names = [
        one.name
        for one in results.contestants
        if one.name != NOVA_ARGV
        and any(
            entry.contestant == one.name
            for case in shown_cases
            for entry in _of(results, case.name)
        )
    ]
    rows = [
        (case.row, case.source, *(_against_nova(results, case.name, name) for name in names))
        for case in shown_cases
    ]
    return table(("conversion", "source", *names), rows)


def _of(results: Results, case: str) -> list[Entry]:
    return [entry for entry in results.entries if entry.case == case]


def _against_nova(results: Results, case: str, contestant: str) -> str:
    try:
        entry = figures.entry(results, case, contestant)
        return str(figures.ratio(entry, figures.entry(results, case, NOVA_ARGV)))
    except LookupError:
        return _failed_or_none(results, case, contestant)


def details(results: Results) -> str:
    """All figures of all contestants, folded away by disk."""
    return "\n\n".join(
        f"<details><summary>{disk.name}</summary>\n\n{_details(results, disk.name)}\n\n</details>"
        for disk in results.disks
    )


def _details(results: Results, disk: str) -> str:
    rows = [
        (case.row, *_detail(entry))
        for case in results.cases
        if case.disk == disk
        for entry in _of(results, case.name)
    ]
    return table(DETAILS, rows)


DETAILS: Final = (
    *("conversion", "contestant", "s", "processors, s"),
    *("page cache, MiB", "dirty, MiB", "written, MiB"),
)


def _detail(entry: Entry) -> Sequence[str]:
    runs = entry.runs
    if not runs:
        return (entry.contestant, "**failed**", NONE, NONE, NONE, NONE)
    return (
        entry.contestant,
        str(figures.seconds(entry)),
        figures.number(statistics.mean(run.cpu_s for run in runs)),
        figures.number(statistics.median(run.cached_bytes for run in runs) / MIB),
        figures.number(max(run.dirty_bytes for run in runs) / MIB),
        figures.number(statistics.median(run.written_bytes for run in runs) / MIB),
    )
