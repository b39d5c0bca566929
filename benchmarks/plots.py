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

from benchmarks.figures import number

OURS: Final = "#c1272d"
THEIRS: Final = "#9aa5b1"
DARK: Final = "#0072b2"

ROW: Final = 0.3
"""The height of a row, in inches."""

mpl.rc("axes", axisbelow=True, grid=True)
mpl.rc("axes.grid", axis="x")
mpl.rc("grid", color="#dddddd")
# Text stays text. Ids have a fixed salt, so that the same figures give the same file.
mpl.rc("svg", fonttype="none", hashsalt="convertd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A conversion, and how long convertd and another contestant took, in seconds."""

    name: str
    ours_s: float
    theirs_s: float

    @property
    def label(self) -> str:
        """The daemon's time, and how it compares, in words."""
        times, seconds = self.theirs_s / self.ours_s, f"{self.ours_s:.2g} s"
        if times >= FASTER:
            return f"{seconds}: {times:.0f} times as fast"
        return f"{seconds}: {times:.1f} times as fast" if times >= EQUAL else seconds


FASTER: Final = 3
EQUAL: Final = 1.05


def overview(pairs: Sequence[Pair], title: str, other: str, file: Path) -> None:
    """Draw two bars for each conversion: convertd's, and that of the other."""
    figure, axes = _picture(len(pairs) * 2 * ROW + 0.7)
    lines = range(len(pairs))
    ours = axes.barh(
        [line - 0.2 for line in lines],
        [pair.ours_s for pair in pairs],
        height=0.38,
        color=OURS,
        label="convertd",
    )
    theirs = axes.barh(
        [line + 0.2 for line in lines],
        [pair.theirs_s for pair in pairs],
        height=0.38,
        color=THEIRS,
        label=other,
    )
    axes.bar_label(theirs, [f"{pair.theirs_s:.2g} s" for pair in pairs], padding=4)
    axes.bar_label(ours, [pair.label for pair in pairs], padding=4, color=OURS, weight="bold")
    axes.margins(x=0.2)
    axes.set_title(title, loc="left", weight="bold")
    axes.xaxis.set_major_formatter("{x:g} s")
    _name_rows(axes, [pair.name for pair in pairs])
    _write(figure, file)


def latencies(samples: Mapping[str, Sequence[float]], file: Path) -> None:
    """Draw the distribution of latencies: the percentage of calls answered within a time."""
    figure, axes = _picture(3)
    for (name, seconds), colour in zip(samples.items(), (DARK, OURS), strict=False):
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
    bars = axes.barh(range(len(found)), took, left=begun, color=DARK)
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
    if names:
        axes.set_ylim(len(names) - 0.5, -0.5)


def _write(figure: Figure, file: Path) -> None:
    if figure.axes[0].get_legend_handles_labels()[1]:
        figure.legend(loc="outside upper left", ncols=5, frameon=False)
    # No date either.
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
