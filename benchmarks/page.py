"""Write the page from the results and page.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from string import Template

from benchmarks import answers, cases, figures, goals, peers, plots
from benchmarks.measured import CaseTold, Entry, Results

BASE = "nova argv"

Rows = Sequence[Sequence[str]]


def write(results: Results, page: Path) -> None:
    """Write the page, and its plots into a directory beside it."""
    template = Template(Path(__file__).with_name("page.md").read_text(encoding="utf-8"))
    pictures = page.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    plots.ratios(_ratio_rows(results), pictures / "ratios.svg")
    plots.answers(_samples(results), pictures / "answers.svg")
    plots.steps(_steps(results), pictures / "steps.svg")
    untraced = figures.find(results, cases.TINY, "convertd")
    text = template.substitute(
        pictures=pictures.name,
        date=results.machine.date,
        minutes=figures.number(results.minutes),
        settings=results.settings,
        goals=goals_table(goals.verdicts(results)),
        contestants=_contestants(results),
        machine=_machine(results),
        ratios=_ratios(results),
        argv=_argv(results.cases),
        entries_count=len(results.entries),
        entries=_entries(results),
        answers=_answers(results),
        starts=len(goals.samples(results, answers.COLD_START)),
        jobs=peers.JOBS,
        crowds=_crowds(results),
        footprints=_footprints(results),
        disk=_disk(results),
        traces_count=len(results.traces),
        untraced=figures.number(figures.seconds(untraced).median * 1000) if untraced else "?",
        steps=table(
            ("until", "ms", "since the call"),
            [
                (name, figures.number(took), figures.number(at))
                for name, took, at in _steps(results)
            ],
        ),
    )
    page.write_text(text, encoding="utf-8")


def table(head: Sequence[str], rows: Rows) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def goals_table(verdicts: Sequence[goals.Verdict]) -> str:
    """Each goal, its measured figure, and whether it is met."""
    rows = [
        (
            verdict.goal.text,
            f"≤ {verdict.goal.limit:g}{verdict.goal.unit}",
            f"{figures.number(verdict.measured)}{verdict.goal.unit}",
            "met" if verdict.is_met else "**not met**",
        )
        for verdict in verdicts
    ]
    return table(("what", "goal", "measured", ""), rows)


def _contestants(results: Results) -> str:
    rows = [(one.name, one.what) for one in results.contestants]
    return table(("contestant", "what it is"), rows)


def _machine(results: Results) -> str:
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    rows = (
        ("processors", f"{machine.cores} of {machine.cpu}"),
        ("memory", f"{machine.memory_mib} MiB"),
        ("system", f"{machine.system}, Linux {machine.kernel}"),
        ("file system", machine.file_system),
        ("load before", f"{machine.load:.2f} (above 0.5 all figures are less reliable)"),
        ("taken by its host", f"{results.stolen:.1%} of the processors' time meanwhile"),
        ("versions", versions),
    )
    return table(("", ""), rows)


def _ratio_rows(results: Results) -> list[plots.Row]:
    rows = []
    for case in results.cases:
        base = figures.find(results, case.name, BASE)
        if base is not None:
            found = {
                entry.contestant: figures.ratio(entry, base)
                for entry in results.entries
                if entry.case == case.name
            }
            rows.append(plots.Row(name=case.name, ratios=found))
    return rows


def _ratios(results: Results) -> str:
    names = [one.name for one in results.contestants if one.name != BASE]
    images = {case.name: case.source for case in results.cases}
    rows = [
        (
            row.name,
            images[row.name],
            *(str(row.ratios[name]) if name in row.ratios else "·" for name in names),
        )
        for row in _ratio_rows(results)
    ]
    return table(("case", "source", *names), rows)


def _argv(told: Sequence[CaseTold]) -> str:
    return table(
        ("case", "command"),
        [(case.name, f"`{' '.join(case.argv)}`" if case.argv else "") for case in told],
    )


def _entries(results: Results) -> str:
    head = ("case", "contestant", "s", "processors, s", "page cache, MiB", "dirty, MiB")
    return table(head, [_entry(entry) for entry in results.entries])


def _entry(entry: Entry) -> tuple[str, ...]:
    mib = 1024 * 1024
    cached = statistics.median(run.cached_bytes for run in entry.runs) / mib
    dirty = max(run.dirty_bytes for run in entry.runs) / mib
    cpu_s = statistics.mean(run.cpu_s for run in entry.runs)
    return (
        entry.case,
        entry.contestant,
        str(figures.seconds(entry)),
        figures.number(cpu_s),
        figures.number(cached),
        figures.number(dirty),
    )


def _samples(results: Results) -> dict[str, list[float]]:
    return {name: goals.samples(results, name) for name in (answers.IDLE, answers.BUSY)}


def _answers(results: Results) -> str:
    rows = []
    for one in results.answers:
        half, most = (figures.percentile(one.seconds, part) * 1000 for part in (50, 99))
        few = one.name == answers.COLD_START
        rows.append((one.name, figures.number(half), "·" if few else figures.number(most)))
    return table(("", "median, ms", "99th percentile, ms"), rows)


def _crowds(results: Results) -> str:
    rows = [
        (
            str(crowd.callers),
            crowd.contestant,
            figures.number(len(crowd.seconds) / crowd.total_s),
            figures.number(figures.percentile(crowd.seconds, 50) * 1000),
            figures.number(figures.percentile(crowd.seconds, 99) * 1000),
        )
        for crowd in results.crowds
    ]
    head = ("callers", "contestant", "conversions a second", "median, ms", "99th percentile, ms")
    return table(head, rows)


def _footprints(results: Results) -> str:
    rows = [
        (one.process, str(one.fresh_pss_kib), str(one.used_pss_kib), str(one.peak_kib))
        for one in results.footprints
    ]
    fresh = sum(one.fresh_pss_kib for one in results.footprints)
    used = sum(one.used_pss_kib for one in results.footprints)
    head = ("process", "idle, just started", "idle, after all conversions", "at most")
    return table(head, [*rows, ("all", str(fresh), str(used), "")])


def _disk(results: Results) -> str:
    mib = 1024 * 1024
    read, wrote = results.disk.read_bytes_per_s / mib, results.disk.write_bytes_per_s / mib
    return f"{figures.number(read)} MiB/s read, {figures.number(wrote)} MiB/s written"


def _steps(results: Results) -> list[tuple[str, float, float]]:
    """Each step's end, how long it took and when that was: medians, in milliseconds."""
    names = [
        name for name in results.traces[0].marks if all(name in t.marks for t in results.traces)
    ]
    found, before = [], 0.0
    for name in names[1:]:
        at = statistics.median(trace.marks[name] for trace in results.traces)
        found.append((name, at - before, at))
        before = at
    return found
