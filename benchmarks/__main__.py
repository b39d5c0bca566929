"""`python -m benchmarks measure`, then `render`. `make bench` does both."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Final

from benchmarks import goals, measure, measured, page, peers, settings
from benchmarks.settings import Settings

RESULTS: Final = peers.ROOT / "build/bench/results.json"
PAGE: Final = peers.ROOT / "docs/benchmarks.md"
DIRECTORY: Final = Path("/var/tmp")  # noqa: S108 - a directory of ours is made in it


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and give its exit status."""
    # For the tests' harness; what is measured is what is installed.
    os.environ.pop("PYTHONPATH", None)
    asked = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    if asked.command == "measure":
        measured.write(measure.everything(_settings(asked), asked.directory), asked.results)
    else:
        results = measured.read(asked.results)
        page.write(results, asked.page)
        sys.stdout.write(page.goals_table(goals.verdicts(results)) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="measure, and keep the results")
    measuring.add_argument("--smoke", action="store_true", help="see only that all of it runs")
    measuring.add_argument(
        "--directory", type=Path, default=DIRECTORY, help="on the disk that is to be measured"
    )
    for field in dataclasses.fields(Settings):
        if field.type == "int":
            measuring.add_argument(f"--{field.name.replace('_', '-')}", type=int, metavar="N")
    rendering = commands.add_parser("render", help="make the page from the results")
    rendering.add_argument("--page", type=Path, default=PAGE)
    for command in (measuring, rendering):
        command.add_argument("--results", type=Path, default=RESULTS)
    return parser


def _settings(asked: argparse.Namespace) -> Settings:
    chosen = settings.SMOKE if asked.smoke else settings.FULL
    names = {field.name for field in dataclasses.fields(Settings)} & vars(asked).keys()
    changed = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    if changed:
        told = ", ".join(f"{name} = {value}" for name, value in sorted(changed.items()))
        changed["name"] = f"{chosen.name}, {told}"
    return dataclasses.replace(chosen, **changed)


if __name__ == "__main__":
    sys.exit(main())
