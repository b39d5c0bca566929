"""The page's pictures, as SVG written by hand: nothing is needed to draw them."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

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
"""Told apart by those who don't see all colours, too, as far as nine can be."""

OTHER: Final = "#444444"
TWO: Final = ("#0072b2", "#c1272d")
WIDTH: Final = 900
LEFT: Final = 300
ROW: Final = 26
TOP: Final = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A case, and each contestant's ratio in it."""

    name: str
    ratios: Mapping[str, Spread]


@dataclass(frozen=True, slots=True)
class Scale:
    """Where on a picture a value is; logarithmic."""

    low: float
    high: float

    def x(self, value: float) -> float:
        """The place, held within the picture."""
        held = min(max(value, self.low), self.high)
        part = math.log(held / self.low) / math.log(self.high / self.low)
        return LEFT + part * (WIDTH - LEFT - 30)


def ratios(rows: Sequence[Row]) -> str:
    """A line for each case, a dot for each contestant, a dash from quartile to quartile."""
    names = list(dict.fromkeys(name for row in rows for name in row.ratios))
    medians = [one.median for row in rows for one in row.ratios.values()]
    scale = Scale(min(*medians, 0.5) / 1.2, max(*medians, 2.0) * 1.2)
    bottom = TOP + ROW * len(rows)
    parts = _legend(names)
    parts += _grid(scale, (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100), "{:g}", bottom)
    for line, row in enumerate(rows):
        y = TOP + ROW * (line + 0.5)
        parts.append(_line(10, y + ROW / 2, WIDTH - 30, y + ROW / 2, "#eeeeee"))
        parts.append(_text(LEFT - 10, y + 4, row.name, "end"))
        for place, (name, one) in enumerate(row.ratios.items()):
            at = y + (place / max(1, len(row.ratios) - 1) - 0.5) * ROW * 0.6
            ends = (scale.x(one.low), at, scale.x(one.high), at)
            parts.append(_line(*ends, COLOURS.get(name, OTHER)))
            parts.append(_dot(scale.x(one.median), at, COLOURS.get(name, OTHER)))
    return _picture(bottom + 30, parts)


def answers(samples: Mapping[str, Sequence[float]]) -> str:
    """How many per cent of the calls are answered within what time."""
    every = [second * 1000 for seconds in samples.values() for second in seconds]
    scale = Scale(min(every) / 1.1, max(every) * 1.1)
    height = 200
    ticks = [base * 10**power for power in range(-2, 5) for base in (1, 2, 5)]
    parts = _grid(scale, ticks, "{:g} ms", TOP + height)
    for percent in (0, 50, 99):
        y = TOP + height * (1 - percent / 100)
        parts.append(_line(LEFT, y, WIDTH - 30, y, "#dddddd"))
        parts.append(_text(LEFT - 10, y + 4, f"{percent} %", "end"))
    for seconds, colour in zip(samples.values(), TWO, strict=True):
        ordered = sorted(second * 1000 for second in seconds)
        points = " ".join(
            f"{scale.x(value):.1f},{TOP + height * (1 - (place + 1) / len(ordered)):.1f}"
            for place, value in enumerate(ordered)
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
    parts += _key(zip(samples, TWO, strict=True))
    return _picture(TOP + height + 30, parts)


def steps(found: Sequence[tuple[str, float, float]]) -> str:
    """Each step as a bar, beginning where the one before it ended."""
    whole = found[-1][2]
    parts = []
    for place, (name, took, at) in enumerate(found):
        y = 20 + place * ROW
        x, width = (LEFT + value / whole * (WIDTH - LEFT - 80) for value in (at - took, took))
        wide = max(width - LEFT, 1)
        parts.append(_text(LEFT - 10, y + 15, name, "end"))
        parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{ROW - 6}" fill="#0072b2"/>'
        )
        parts.append(_text(x + wide + 6, y + 15, f"{number(took)} ms"))
    return _picture(20 + ROW * len(found) + 10, parts)


def _legend(names: Sequence[str]) -> list[str]:
    return _key((name, COLOURS.get(name, OTHER)) for name in names)


def _key(pairs: Iterable[tuple[str, str]]) -> list[str]:
    parts: list[str] = []
    x = 10.0
    for name, colour in pairs:
        parts += [_dot(x + 5, 18, colour), _text(x + 15, 22, name)]
        x += 30 + 7 * len(name)
    return parts


def _grid(scale: Scale, ticks: Sequence[float], shape: str, bottom: float) -> list[str]:
    parts = []
    for tick in ticks:
        if scale.low <= tick <= scale.high:
            x = scale.x(tick)
            colour = "#888888" if tick == 1 else "#dddddd"
            parts += [
                _line(x, TOP - 5, x, bottom, colour),
                _text(x, bottom + 16, shape.format(tick), "middle"),
            ]
    return parts


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="1.5"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _picture(height: float, parts: Sequence[str]) -> str:
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    style = 'font-family="sans-serif" font-size="12"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    body = "\n".join((background, *parts))
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{body}\n</svg>\n'
