"""Write the page from the results and page.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Final

from benchmarks import callers, cases, comparisons, figures, goals, latency, plots, tables
from benchmarks.contestants import CONVERTD
from benchmarks.results import Results
from benchmarks.tables import table

TEMPLATE: Final = Path(__file__).with_name("page.md")


def write(results: Results, page: Path) -> None:
    """Write the page, and its plots into a directory next to it."""
    pictures = page.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    draw(results, pictures)
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    text = template.substitute(
        pictures=pictures.name,
        date=results.machine.date,
        minutes=figures.number(results.minutes),
        settings=results.settings,
        failures="".join(f"- Failed: {failure}\n" for failure in failures(results)),
        goals=goals_table(goals.verdicts(results)),
        contestants=tables.contestants(results),
        machine=tables.machine(results),
        disks=tables.disks(results),
        sharing=comparisons.sharing(results),
        copying=comparisons.copying(results),
        ratios=comparisons.all_contestants(results, cases.OWN),
        argv=tables.argv(results),
        details=comparisons.details(results),
        latencies=tables.latencies(results),
        starts=len(_samples(results, latency.COLD_START)),
        jobs=callers.JOBS,
        throughputs=tables.throughputs(results),
        memory=tables.memory(results),
        traces_count=len(results.traces),
        untraced=_tiny_ms(results),
        steps=tables.steps(results),
    )
    page.write_text(text, encoding="utf-8")


def draw(results: Results, directory: Path) -> None:
    """Write the plots, and remove those of earlier runs."""
    for picture in directory.glob("*.svg"):
        picture.unlink()
    plots.overview(
        comparisons.overview(results),
        f"Time to convert a disk of {comparisons.files_disk(results)}",
        "qemu-img, as Nova runs it",
        directory / "overview.svg",
    )
    latencies = {name: _samples(results, name) for name in (latency.IDLE, latency.BUSY)}
    measured = {name: samples for name, samples in latencies.items() if samples}
    plots.latencies(measured, directory / "latencies.svg")
    plots.steps(tables.step_times(results), directory / "steps.svg")


def failures(results: Results) -> list[str]:
    """What could not be measured, and which contestants failed, with the reasons."""
    failed = [
        f"{one.case}: {one.contestant}: {one.failure}" for one in results.entries if one.failure
    ]
    return [*results.failures, *failed]


def goals_table(verdicts: Sequence[goals.Verdict]) -> str:
    """Each goal, its measured figure, and whether it is met."""
    return table(("what", "goal", "measured", ""), [_goal(verdict) for verdict in verdicts])


def _goal(verdict: goals.Verdict) -> tuple[str, ...]:
    goal, measured = verdict.goal, verdict.measured
    limit = f"≤ {goal.limit:g}{goal.unit}"
    if measured is None:
        return goal.text, limit, f"not measured: {verdict.reason}", "**not met**"
    where = f" ({measured.where})" if measured.where else ""
    figure = f"{figures.number(measured.value)}{goal.unit}{where}"
    return goal.text, limit, figure, "met" if verdict.is_met else "**not met**"


def _samples(results: Results, name: str) -> list[float]:
    return next((one.seconds for one in results.latencies if one.name == name), [])


def _tiny_ms(results: Results) -> str:
    try:
        ours = figures.entry(results, cases.name(cases.TINY, cases.OWN), CONVERTD)
    except LookupError:
        return "?"
    return figures.number(figures.seconds(ours).median * 1000)
