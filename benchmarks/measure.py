"""Measure everything, on one set of images, with one daemon."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.daemon import Daemon
from harness.mounts import Mounts

from benchmarks import (
    answers,
    cases,
    contestants,
    disk,
    footprint,
    images,
    machine,
    measured,
    peers,
    race,
    timeline,
    usage,
)
from benchmarks.cases import Case
from benchmarks.peers import Line, Racer
from benchmarks.settings import Settings

XFS_LOG_MIB = 512

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """The setup: two directories, the cases, and convertd's qemu-img arguments for each."""

    images: Path
    xfs: Path
    cases: tuple[Case, ...]
    argv: Mapping[str, list[str]]
    settings: Settings

    def case(self, name: str) -> Case:
        """The case of that name."""
        (found,) = [case for case in self.cases if case.name == name]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """The processes that run during all measurements."""

    daemon: Daemon
    line: Line
    nova: Line
    fresh_kib: dict[str, int]


def everything(settings: Settings, directory: Path) -> measured.Results:
    """Run all measurements.

    Raises:
        peers.Failed: a contestant failed, or results differ.
    """
    began, stolen_s = time.monotonic(), usage.stolen_s()
    told = machine.look(directory)
    with _course(settings, directory) as course, _crew(course) as crew:
        racers: tuple[Racer, ...] = (
            *(peers.CommandLine(*pair) for pair in contestants.COMMANDS.items()),
            peers.Nova(crew.nova),
            peers.SameArgv(course.argv),
            peers.Convertd(crew.daemon, crew.line),
            disk.Fio(),
        )
        race.warm_up(course.case(cases.TINY), racers)
        entries = [
            entry for case in course.cases for entry in race.race(case, racers, settings.patience)
        ]
        log.info("memory, answers, crowds, steps, disk")
        tiny, packed = course.case(cases.TINY), course.case(cases.ZSTD)
        load = (tiny, course.case(cases.FILES_TO_RAW), packed)
        return measured.Results(
            settings=settings.name,
            machine=told,
            contestants=[
                measured.ContestantTold(name=racer.name, what=racer.what) for racer in racers
            ],
            cases=[_told(case, course.argv[case.name]) for case in course.cases],
            entries=entries,
            footprints=footprint.measure(crew.daemon, crew.line, crew.fresh_kib, load),
            answers=[
                answers.cold_start(course.images, course.xfs, settings),
                *answers.access(crew.daemon, crew.line, course.case(cases.ZLIB), settings),
            ],
            crowds=answers.crowds(crew.daemon, crew.nova, tiny, course.argv[tiny.name], settings),
            traces=timeline.trace(course.images, course.xfs, tiny, settings),
            disk=disk.rates(course.images, settings.noise_mib),
            minutes=(time.monotonic() - began) / 60,
            stolen=(usage.stolen_s() - stolen_s) / (time.monotonic() - began) / told.cores,
        )


@contextlib.contextmanager
def _course(settings: Settings, directory: Path) -> Iterator[Course]:
    """Make images, and learn convertd's qemu-img arguments for each case from a verbose daemon."""
    home = Path(tempfile.mkdtemp(prefix="convertd-bench-", dir=directory))
    home.chmod(0o755)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, home)
        plain = home / "images"
        plain.mkdir()
        mounts = stack.enter_context(Mounts(home))
        xfs = mounts.on_a_loop("xfs", "xfs", settings.empty_disk_mib + XFS_LOG_MIB)
        log.info("making images")
        all_cases = cases.make(images.make(plain, xfs, settings), settings)
        log.info("asking convertd what it runs")
        with peers.daemon(plain, xfs, "--verbose") as verbose, peers.caller(verbose.socket) as line:
            argv = {case.name: _learn(verbose, line, case) for case in all_cases}
        yield Course(images=plain, xfs=xfs, cases=all_cases, argv=argv, settings=settings)


def _learn(verbose: Daemon, line: Line, case: Case) -> list[str]:
    dest = case.source.path.with_name("learnt")
    race.prepare(case)
    argv = peers.what_it_runs(verbose, line, case, dest)
    dest.unlink()
    return argv


@contextlib.contextmanager
def _crew(course: Course) -> Iterator[Crew]:
    with (
        peers.daemon(course.images, course.xfs) as daemon,
        peers.caller(daemon.socket) as line,
        peers.nova_caller() as nova,
    ):
        line.order("ask", 1)
        fresh_kib = footprint.idle_kib(daemon)
        yield Crew(daemon=daemon, line=line, nova=nova, fresh_kib=fresh_kib)


def _told(case: Case, argv: list[str]) -> measured.CaseTold:
    return measured.CaseTold(
        name=case.name,
        source=case.source.what,
        data_bytes=case.source.data_bytes,
        argv=[argument.replace(str(case.source.path), "SOURCE") for argument in argv],
    )
