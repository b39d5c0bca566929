"""Measure everything: disk after disk, each with a daemon of its own, then the service itself."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.daemon import Daemon

from benchmarks import (
    callers,
    cases,
    command_lines,
    contestants,
    disks,
    fio,
    latency,
    machine,
    memory,
    results,
    rounds,
    throughput,
    timeline,
    usage,
)
from benchmarks.callers import CallerProcess
from benchmarks.cases import Case, Row
from benchmarks.contestants import Contestant
from benchmarks.images import Images
from benchmarks.results import Results
from benchmarks.settings import FULL, Settings

CONVERSIONS: Final = "conversions"
MEMORY: Final = "memory"
LATENCY: Final = "latency"
THROUGHPUT: Final = "throughput"
STEPS: Final = "steps"
PARTS: Final = (CONVERSIONS, MEMORY, LATENCY, THROUGHPUT, STEPS)
"""What is measured: conversions on each disk, the others on the machine's own."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What is to be measured: on which disks, which parts, and rows whose names have these texts.

    No texts are all rows.
    """

    disks: tuple[str, ...] = cases.DEFAULT
    parts: tuple[str, ...] = PARTS
    rows: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether it is all that the page shows."""
        disks_, copying = {*self.disks}, {*self.disks} & {*cases.PLAIN}
        has_disks = disks_ >= cases.NEEDED and len(copying) > 1
        return has_disks and not self.rows and {*self.parts} == {*PARTS}

    def needed_disks(self) -> tuple[str, ...]:
        """The chosen disks on which anything is to be measured."""
        service = {cases.OWN} if set(self.parts) - {CONVERSIONS} else set()
        return tuple(disk for disk in self.disks if disk in service or self.rows_of(disk))

    def rows_of(self, disk: str) -> tuple[Row, ...]:
        """The chosen rows of a disk."""
        if CONVERSIONS not in self.parts:
            return ()
        return tuple(
            row
            for row in cases.ROWS[disk]
            if not self.rows or any(text in row.name for text in self.rows)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What runs during all measurements of a disk."""

    settings: Settings
    disk: disks.Disk
    images: Images
    daemon: Daemon
    caller: CallerProcess
    nova: CallerProcess
    fresh_kib: dict[str, int]


class Measurement:
    """A run. What can't be measured is noted in the results, and the run goes on."""

    def __init__(self, settings: Settings, choice: Choice, save: Callable[[Results], None]) -> None:
        """`save` gets the results whenever there are more of them."""
        self._settings = settings
        self._choice = choice
        self._save = save
        self._found = Results(
            settings=settings.name,
            machine=machine.describe(),
            complete=choice.is_complete and settings.name.startswith(FULL.name),
        )

    def run(self, directory: Path) -> Results:
        """Run, with all files in a directory that is made in this one."""
        began, stolen_s = time.monotonic(), usage.stolen_s()
        with _home(directory) as home, callers.nova_caller() as nova:
            originals = Images(disks.own_directory(home), self._settings)
            for name in self._choice.needed_disks():
                with (
                    self._noted(name),
                    disks.mounted(name, home, self._settings) as disk,
                    self._set_up(disk, originals, nova) as setup,
                ):
                    self._measure(setup)
        lasted_s = time.monotonic() - began
        self._found.minutes = lasted_s / 60
        self._found.stolen = (usage.stolen_s() - stolen_s) / lasted_s / self._found.machine.cores
        self._save(self._found)
        return self._found

    @contextlib.contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        """Note the failure of a part, and save what there is."""
        try:
            yield
        except Exception as error:
            log.exception("%s could not be measured", what)
            self._found.failures.append(f"{what}: {type(error).__name__}: {error}")
        self._save(self._found)

    @contextlib.contextmanager
    def _set_up(self, disk: disks.Disk, originals: Images, nova: CallerProcess) -> Iterator[Setup]:
        own = disk.name == cases.OWN
        images = originals if own else Images(disk.directory, self._settings, originals)
        log.info("making images on %s", disk.name)
        for row in self._choice.rows_of(disk.name):
            images.make(row.image)
        images.flush()
        with (
            callers.daemon(disk.directory) as daemon,
            callers.caller(daemon.socket) as caller,
        ):
            caller.call("access", 1)
            yield Setup(
                settings=self._settings,
                disk=disk,
                images=images,
                daemon=daemon,
                caller=caller,
                nova=nova,
                fresh_kib=memory.idle_kib(daemon),
            )

    def _measure(self, setup: Setup) -> None:
        disk = setup.disk
        self._found.disks.append(disk.info(self._settings.random_mib))
        self._convert(setup, _cases(setup, self._choice.rows_of(disk.name)))
        if disk.name == cases.OWN:
            self._measure_service(setup)

    def _convert(self, setup: Setup, all_cases: Sequence[Case]) -> None:
        argv = self._qemu_arguments(setup, all_cases)
        participants: tuple[Contestant, ...] = (
            *(contestants.CommandLine(*pair) for pair in command_lines.COMMANDS.items()),
            contestants.Nova(setup.nova),
            contestants.SameArgv(argv),
            contestants.Convertd(setup.daemon, setup.caller),
            contestants.ConvertdCopying(setup.daemon, setup.caller),
            fio.Fio(),
        )
        self._found.contestants = [
            results.ContestantInfo(name=one.name, description=one.description)
            for one in participants
        ]
        for case in all_cases[:1]:
            rounds.warm_up(case, participants)
        for case in all_cases:
            with self._noted(case.name):
                self._found.cases.append(_case_info(case, argv.get(case.name, [])))
                self._found.entries += rounds.convert(
                    case, participants, self._settings.idle_timeout
                )

    def _qemu_arguments(self, setup: Setup, all_cases: Sequence[Case]) -> dict[str, list[str]]:
        """What arguments convertd gives qemu-img in each case: a verbose daemon logs them.

        Only for the cases in which qemu-img alone is measured with the same arguments.
        """
        log.info("asking convertd what it runs on %s", setup.disk.name)
        found: dict[str, list[str]] = {}
        dest = setup.disk.directory / "result"
        with (
            callers.daemon(setup.disk.directory, "--verbose") as verbose,
            callers.caller(verbose.socket) as caller,
        ):
            for case in all_cases:
                if not case.row.contestants or contestants.SAME_ARGV in case.row.contestants:
                    with self._noted(f"arguments of {case.name}"):
                        rounds.prepare(case)
                        found[case.name] = contestants.qemu_arguments(verbose, caller, case, dest)
                    dest.unlink(missing_ok=True)
        return found

    def _measure_service(self, setup: Setup) -> None:
        parts = {
            MEMORY: self._measure_memory,
            LATENCY: self._measure_latency,
            THROUGHPUT: self._measure_throughput,
            STEPS: self._measure_steps,
        }
        for name, measure in parts.items():
            if name in self._choice.parts:
                log.info("measuring %s", name)
                with self._noted(name):
                    measure(setup)

    def _measure_memory(self, setup: Setup) -> None:
        load = _own_cases(setup, cases.TINY, cases.FILES_TO_RAW, cases.ZSTD)
        self._found.memory = memory.measure(setup.daemon, setup.caller, setup.fresh_kib, load)

    def _measure_latency(self, setup: Setup) -> None:
        (load,) = _own_cases(setup, cases.ZLIB)
        self._found.latencies = [
            latency.cold_start(setup.disk.directory, setup.settings),
            *latency.access(setup.daemon, setup.caller, load, setup.settings),
        ]

    def _measure_throughput(self, setup: Setup) -> None:
        (tiny,) = _own_cases(setup, cases.TINY)
        self._found.throughputs = throughput.measure(setup.daemon, setup.nova, tiny, setup.settings)

    def _measure_steps(self, setup: Setup) -> None:
        (tiny,) = _own_cases(setup, cases.TINY)
        self._found.traces = timeline.trace(setup.disk.directory, tiny, setup.settings)


@contextlib.contextmanager
def _home(directory: Path) -> Iterator[Path]:
    """A directory that all users may enter, in that one."""
    home = Path(tempfile.mkdtemp(prefix="convertd-bench-", dir=directory))
    try:
        home.chmod(0o755)
        yield home
    finally:
        shutil.rmtree(home)


def _cases(setup: Setup, rows: Sequence[Row]) -> tuple[Case, ...]:
    return cases.make(setup.disk.name, rows, setup.images, setup.settings)


def _own_cases(setup: Setup, *names: str) -> tuple[Case, ...]:
    rows = {row.name: row for row in cases.ROWS[cases.OWN]}
    return _cases(setup, [rows[name] for name in names])


def _case_info(case: Case, argv: Sequence[str]) -> results.CaseInfo:
    return results.CaseInfo(
        name=case.name,
        row=case.row.name,
        disk=case.disk,
        source=case.source.description,
        data_bytes=case.source.data_bytes,
        argv=[argument.replace(str(case.source.path), "SOURCE") for argument in argv],
    )
