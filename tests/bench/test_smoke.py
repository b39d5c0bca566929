"""The benchmarks, with tiny images: that everything is measured. How quick anything is, is not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import pytest

ROOT: Final = Path(__file__).parents[2]

GOALS: Final = 20

CONVERT: Final = """
import pathlib, sys
import msgspec
from benchmarks import cases, contestants, images, rounds
source, command = pathlib.Path(sys.argv[1]), sys.argv[2:]
source.write_bytes(b"guest" * 2**16)
size = source.stat().st_size
image = images.Image(
    name="", path=source, format="raw", description="", virtual_bytes=size, data_bytes=size
)
row = cases.Row(name="row", image="", dest_format="raw")
case = cases.Case(disk="disk", row=row, source=image, rounds=2)
somebody = contestants.CommandLine("somebody", lambda _, dest: [[*command, str(dest)]])
copy = contestants.CommandLine("copy", lambda _, dest: [["cp", str(source), str(dest)]])
print(msgspec.json.encode(rounds.convert(case, [somebody, copy], 0)).decode())
"""
"""Two rounds of two contestants: a copy, and a command that the result's path is added to."""


@pytest.fixture(scope="module")
def private_clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository, with its environment, below a directory that only root may enter."""
    home = tmp_path_factory.mktemp("home")
    home.chmod(0o700)
    clone = home / "clone"
    clone.mkdir()
    for name in ("benchmarks", "build", "tests"):
        (clone / name).symlink_to(ROOT / name)
    (clone / ".venv").symlink_to(sys.prefix)
    return clone


def benchmarks(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the benchmarks in reach, as make does."""
    return subprocess.run(
        [clone / ".venv/bin/python", *arguments],
        cwd=clone,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": "tests/plugins:."},
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.timeout(900)
def test_benchmark_in_a_directory_of_root_writes_all_measurements(
    tmp_path: Path, private_clone: Path
) -> None:
    """Callers of other users can't enter it. Whoever fails or has a wrong result has no figures."""
    assert os.stat(private_clone.parent).st_mode & 0o077 == 0
    found, page = tmp_path / "results.json", tmp_path / "page.md"
    measure = ("-m", "benchmarks", "measure", "--smoke", "--results", str(found))
    run = benchmarks(private_clone, *measure)
    assert run.returncode == 0, run.stderr
    render = ("-m", "benchmarks", "render", "--results", str(found), "--page", str(page))
    made = benchmarks(private_clone, *render)
    assert made.returncode == 0, made.stderr
    results = json.loads(found.read_text())
    assert results["failures"] == []
    converted = {(entry["case"], entry["contestant"]) for entry in results["entries"]}
    cases = {case["name"] for case in results["cases"]}
    assert {case for case, name in converted if name == "convertd"} == cases
    assert {name for _, name in converted} == {one["name"] for one in results["contestants"]}
    assert len({case["disk"] for case in results["cases"]}) == 4
    assert all(entry["runs"] for entry in results["entries"])
    verdicts = re.findall(r"\| (.*) \| (?:met|\*\*not met\*\*) \|$", made.stdout, re.MULTILINE)
    assert len(verdicts) == GOALS
    unmeasured = [verdict for verdict in verdicts if "not measured" in verdict]
    assert all("no disk here is faster through the page cache" in one for one in unmeasured)
    assert made.stdout.strip() in page.read_text()
    pictures = re.findall(r"\]\((\S+\.svg)\)", page.read_text())
    drawn = {picture: (page.parent / picture).read_bytes() for picture in pictures}
    assert drawn
    for picture in drawn.values():
        assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314 - our own
    again = benchmarks(private_clone, *render)
    assert again.returncode == 0, again.stderr
    assert {picture: (page.parent / picture).read_bytes() for picture in pictures} == drawn


@pytest.mark.timeout(300)
def test_benchmark_of_chosen_rows_measures_these_and_says_what_is_missing(
    tmp_path: Path, private_clone: Path
) -> None:
    """A part of the measurements does not become the published page."""
    found = tmp_path / "results.json"
    chosen = (
        "--disks",
        "own",
        "cached",
        "memory",
        "--parts",
        "conversions",
        "--rows",
        "random raw → raw",
    )
    measure = ("-m", "benchmarks", "measure", "--smoke", "--results", str(found))
    run = benchmarks(private_clone, *measure, *chosen)
    assert run.returncode == 0, run.stderr
    render = ("-m", "benchmarks", "render", "--results", str(found))
    made = benchmarks(private_clone, *render)
    assert made.returncode == 0, made.stderr
    assert "wrote " in made.stderr
    assert "build/bench/partial.md" in made.stderr
    results = json.loads(found.read_text())
    assert results["failures"] == []
    measured = [(case["row"], case["disk"]) for case in results["cases"]]
    disks = ("own disk", "cached disk", "memory disk")
    assert measured == [("random raw → raw", disk) for disk in disks]
    (cold_start,) = [line for line in made.stdout.splitlines() if "cold start" in line]
    assert "not measured" in cold_start


def convert(tmp_path: Path, clone: Path, command: list[str]) -> dict[str, Any]:
    """Have somebody convert beside a copy; gives both's results."""
    source = tmp_path / "source"
    argv = [part.replace("{source}", str(source)) for part in command]
    run = benchmarks(clone, "-c", CONVERT, str(source), *argv)
    assert run.returncode == 0, run.stderr
    return {entry["contestant"]: entry for entry in json.loads(run.stdout)}


@pytest.mark.parametrize(
    ("command", "failure"),
    [
        pytest.param(["truncate", "--size=320K"], "wrong result", id="zeroes"),
        pytest.param(["cat"], "ended with 1", id="a failure"),
        pytest.param(["/absent"], "No such file", id="a program that is not there"),
    ],
)
def test_benchmark_shows_a_failure_and_goes_on(
    tmp_path: Path, private_clone: Path, command: list[str], failure: str
) -> None:
    """To be quick with something else is no merit, and no reason to measure nobody else."""
    found = convert(tmp_path, private_clone, command)
    assert found["somebody"]["runs"] == []
    assert failure in found["somebody"]["failure"]
    assert len(found["copy"]["runs"]) == 2
    assert found["copy"]["failure"] == ""


def test_benchmark_measures_a_right_result(tmp_path: Path, private_clone: Path) -> None:
    """What is like its source has a figure for each round."""
    found = convert(tmp_path, private_clone, ["cp", "{source}"])
    assert len(found["somebody"]["runs"]) == 2
