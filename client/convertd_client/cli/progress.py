"""Show a conversion's progress: as a bar, lines, or JSON."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import click

from convertd_client import results
from convertd_client.cli import json_output, text

Show = Callable[[results.Progress], None]


def shower(*, as_json: bool, quiet: bool) -> contextlib.AbstractContextManager[Show]:
    """Choose how to show progress. The context gives a function to call with each report."""
    if as_json:
        return contextlib.nullcontext(_json)
    if quiet:
        return contextlib.nullcontext(_nothing)
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return _bar()
    return contextlib.nullcontext(Lines().show)


def words(progress: results.Progress) -> str:
    """The phase of a conversion, in words."""
    if progress.phase is not results.Phase.QUEUED:
        return str(progress.phase)
    before = progress.queue_position
    return f"queued, {before} before it" if before else "queued, next"


class Speed:
    """The speed of a conversion, measured from the start of its phase `converting`."""

    def __init__(self) -> None:
        self._began: results.Progress | None = None

    def of(self, progress: results.Progress) -> float:
        """Bytes per second, 0 where that is unknown."""
        if progress.phase is not results.Phase.CONVERTING:
            return 0.0
        began = self._began = self._began or progress
        seconds = progress.elapsed_seconds - began.elapsed_seconds
        return (progress.bytes_done - began.bytes_done) / seconds if seconds > 0 else 0.0


class Lines:
    """Print a line for each phase, and for every 10 % of the conversion."""

    def __init__(self) -> None:
        self._speed = Speed()
        self._last: tuple[str, int] | None = None

    def show(self, progress: results.Progress) -> None:
        """Print a line if phase or tenth have changed."""
        speed = self._speed.of(progress)
        converting = progress.phase is results.Phase.CONVERTING
        step = words(progress), int(progress.percent // 10) if converting else 0
        if step == self._last:
            return
        self._last = step
        parts = [words(progress)]
        if converting:
            parts[0] += f" {progress.percent:.0f} %"
            if speed:
                left = (progress.bytes_total - progress.bytes_done) / speed
                parts += [text.rate(speed)]
                parts += [f"{text.duration(left)} left"] if left >= 1 else []
        click.echo(", ".join(parts), err=True)


def _json(progress: results.Progress) -> None:
    json_output.line(progress, "progress")


def _nothing(_: results.Progress) -> None:
    pass


@contextlib.contextmanager
def _bar() -> Iterator[Show]:
    from rich import console, progress  # noqa: PLC0415 - slow to import, and rarely wanted

    speed = Speed()
    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console.Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("connecting", total=None, rate="")

        def show(progress: results.Progress) -> None:
            per_second = speed.of(progress)
            bar.update(
                task,
                description=words(progress),
                completed=progress.bytes_done,
                total=progress.bytes_total or None,
                rate=text.rate(per_second) if per_second else "",
            )

        yield show
