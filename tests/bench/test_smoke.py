"""The benchmarks, with tiny images: that everything is measured. How quick anything is, is not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import pytest

ROOT: Final = Path(__file__).parents[2]

GOALS: Final = 12

RACE: Final = """
import pathlib, sys
from benchmarks import cases, images, peers, race
source, command = pathlib.Path(sys.argv[1]), sys.argv[2:]
source.write_bytes(b"guest" * 2**16)
size = source.stat().st_size
image = images.Image(
    name="", path=source, format="raw", what="", virtual_bytes=size, data_bytes=size
)
case = cases.Case(name="case", source=image, dest_format="raw", rounds=1)
racer = peers.CommandLine("somebody", lambda _, dest: [[*command, str(dest)]])
print(len(race.race(case, [racer], 0)))
"""
"""One contestant's race, with a command that the result's path is added to."""


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the benchmarks in reach, as make does."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": "tests/plugins:."},
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.timeout(900)
def test_benchmark_writes_all_measurements(tmp_path: Path) -> None:
    """Every contestant's result is compared with its source, or there are no results at all."""
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    run = benchmarks("-m", "benchmarks", "measure", "--smoke", "--results", str(results))
    assert run.returncode == 0, run.stderr
    made = benchmarks("-m", "benchmarks", "render", "--results", str(results), "--page", str(page))
    assert made.returncode == 0, made.stderr
    told = json.loads(results.read_text())
    raced = {(entry["case"], entry["contestant"]) for entry in told["entries"] if entry["runs"]}
    cases = {case["name"] for case in told["cases"]}
    assert {case for case, name in raced if name == "convertd"} == cases
    assert {name for _, name in raced} == {one["name"] for one in told["contestants"]}
    assert len(re.findall(r"\| (?:met|\*\*not met\*\*) \|$", made.stdout, re.MULTILINE)) == GOALS
    assert made.stdout.strip() in page.read_text()
    pictures = re.findall(r"\]\((\S+\.svg)\)", page.read_text())
    drawn = {picture: (page.parent / picture).read_bytes() for picture in pictures}
    assert drawn
    for picture in drawn.values():
        assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314 - our own
    again = benchmarks("-m", "benchmarks", "render", "--results", str(results), "--page", str(page))
    assert again.returncode == 0, again.stderr
    assert {picture: (page.parent / picture).read_bytes() for picture in pictures} == drawn


@pytest.mark.parametrize(
    ("command", "said"),
    [
        pytest.param(["cp", "{source}"], "", id="a copy"),
        pytest.param(["truncate", "--size=320K"], "somebody on case", id="zeroes"),
        pytest.param(["cat"], "ended with 1", id="a failure"),
    ],
)
def test_benchmark_gives_no_time_to_a_wrong_result(
    tmp_path: Path, command: list[str], said: str
) -> None:
    """To be quick with something else is no merit."""
    source = tmp_path / "source"
    argv = [part.replace("{source}", str(source)) for part in command]
    run = benchmarks("-c", RACE, str(source), *argv)
    assert (run.returncode == 0) is (not said), run.stderr
    assert said in run.stderr
