"""The page's plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import matplotlib as mpl
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.figures import Spread, number

COLOURS: Final = {
    "convertd": "#c1272d",
    "same argv": "#e69f00",
    "nova": "#0072b2",
    "nova argv": "#56b4e9",
    "vdsm argv": "#009e73",
    "cdi argv": "#cc79a7",
    "cp": "#777777",
    "nbdcopy": "#8b5a2b",
    "fio": "#000000",
}
"""Distinct also for colour-blind readers, as far as nine colours can be."""

OTHER: Final = "#444444"
ROW: Final = 0.3
"""The height of a row, in inches."""

mpl.rc("axes", axisbelow=True, grid=True)
mpl.rc("axes.grid", axis="x")
mpl.rc("grid", color="#dddddd")
# Text stays text. Ids have a fixed salt, so that the same figures give the same file.
mpl.rc("svg", fonttype="none", hashsalt="convertd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A case, and each contestant's ratio in it."""

    name: str
    ratios: Mapping[str, Spread]


def ratios(rows: Sequence[Row], file: Path) -> None:
    """Draw a row for each case, a dot for each contestant, a line from quartile to quartile."""
    names = list(dict.fromkeys(name for row in rows for name in row.ratios))
    figure, axes = _picture(len(rows) * ROW + 1)
    for name in names:
        found = [(line, row) for line, row in enumerate(rows) if name in row.ratios]
        spreads = [row.ratios[name] for _, row in found]
        axes.errorbar(
            [one.median for one in spreads],
            [line + _offset(list(row.ratios), name) for line, row in found],
            xerr=(
                [one.median - one.low for one in spreads],
                [one.high - one.median for one in spreads],
            ),
            fmt="o",
            markersize=4,
            color=COLOURS.get(name, OTHER),
            label=name,
        )
    axes.set_xscale("log")
    axes.axvline(1, color="#888888", zorder=0)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    _name_rows(axes, [row.name for row in rows])
    _write(figure, file)


def _offset(names: Sequence[str], name: str) -> float:
    return 0.6 * (names.index(name) / max(1, len(names) - 1) - 0.5)


def answers(samples: Mapping[str, Sequence[float]], file: Path) -> None:
    """Draw the distribution of latencies: the percentage of calls answered within a time."""
    figure, axes = _picture(3)
    for (name, seconds), colour in zip(samples.items(), ("#0072b2", "#c1272d"), strict=True):
        axes.ecdf([second * 1000 for second in seconds], label=name, color=colour, linewidth=2)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g} ms")
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(xmax=1))
    axes.set_yticks((0, 0.5, 0.99))
    _write(figure, file)


def steps(found: Sequence[tuple[str, float, float]], file: Path) -> None:
    """Draw each step as a bar that begins where the one before it ended."""
    figure, axes = _picture(len(found) * ROW + 0.5)
    took = [step[1] for step in found]
    begun = [at - width for _, width, at in found]
    bars = axes.barh(range(len(found)), took, left=begun, color="#0072b2")
    axes.bar_label(bars, [f"{number(width)} ms" for width in took], padding=4)
    axes.margins(x=0.15)
    axes.xaxis.set_major_formatter("{x:g} ms")
    _name_rows(axes, [name for name, _, _ in found])
    _write(figure, file)


def _picture(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.add_subplot()


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _write(figure: Figure, file: Path) -> None:
    if figure.axes[0].get_legend_handles_labels()[1]:
        figure.legend(loc="outside upper left", ncols=5, frameon=False)
    # No date either.
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
