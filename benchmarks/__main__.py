"""`python -m benchmarks measure`, then `render`. `make bench` does both."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Final

from benchmarks import callers, cases, goals, measure, page, results, settings
from benchmarks.settings import Settings

RESULTS: Final = callers.ROOT / "build/bench/results.json"
PAGE: Final = callers.ROOT / "docs/benchmarks.md"
PARTIAL_PAGE: Final = RESULTS.with_name("partial.md")
DIRECTORY: Final = Path("/var/tmp")  # noqa: S108 - a directory of ours is made in it

DISKS: Final = {name.split()[0].lower(): name for name in cases.ROWS}


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and give its exit status."""
    # For the tests' harness; what is measured is what is installed.
    os.environ.pop("PYTHONPATH", None)
    options = _parser().parse_args(arguments)
    # Whatever was mounted and started is taken away then, too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    return _measure(options) if options.command == "measure" else _render(options)


def _measure(options: argparse.Namespace) -> int:
    save = functools.partial(results.write, path=options.results)
    measure.Measurement(_settings(options), _choice(options), save).run(options.directory)
    return 0


def _render(options: argparse.Namespace) -> int:
    """Write the page. The status is 1 if something could not be measured."""
    found = results.read(options.results)
    path = options.page or (PAGE if found.complete else PARTIAL_PAGE)
    page.write(found, path)
    sys.stderr.write(f"wrote {path}\n")
    sys.stdout.write(page.goals_table(goals.verdicts(found)) + "\n")
    failures = page.failures(found)
    for failure in failures:
        sys.stderr.write(f"failed: {failure}\n")
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="measure, and keep the results")
    measuring.add_argument("--smoke", action="store_true", help="see only that all of it runs")
    measuring.add_argument(
        "--directory", type=Path, default=DIRECTORY, help="on the disk that is to be measured"
    )
    measuring.add_argument(
        "--disks",
        nargs="+",
        choices=tuple(DISKS),
        default=[key for key, name in DISKS.items() if name in cases.DEFAULT],
    )
    measuring.add_argument(
        "--parts", nargs="+", choices=measure.PARTS, default=measure.PARTS, help="what to measure"
    )
    measuring.add_argument(
        "--rows", nargs="+", default=(), metavar="TEXT", help="rows whose names have such a text"
    )
    for field in dataclasses.fields(Settings):
        if field.type == "int":
            measuring.add_argument(f"--{field.name.replace('_', '-')}", type=int, metavar="N")
    rendering = commands.add_parser("render", help="make the page from the results")
    rendering.add_argument(
        "--page", type=Path, help="default: docs/benchmarks.md, unless only a part was measured"
    )
    for command in (measuring, rendering):
        command.add_argument("--results", type=Path, default=RESULTS)
    return parser


def _choice(options: argparse.Namespace) -> measure.Choice:
    return measure.Choice(
        disks=tuple(DISKS[name] for name in options.disks),
        parts=tuple(options.parts),
        rows=tuple(options.rows),
    )


def _settings(options: argparse.Namespace) -> Settings:
    chosen = settings.SMOKE if options.smoke else settings.FULL
    names = {field.name for field in dataclasses.fields(Settings)} & vars(options).keys()
    changed = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if changed:
        listed = ", ".join(f"{name} = {value}" for name, value in sorted(changed.items()))
        changed["name"] = f"{chosen.name}, {listed}"
    return dataclasses.replace(chosen, **changed)


if __name__ == "__main__":
    sys.exit(main())
