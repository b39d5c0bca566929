"""The results as values, written and read as JSON."""

from __future__ import annotations

from pathlib import Path

import msgspec


class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the results."""


class Run(Value, frozen=True, kw_only=True):
    """One conversion. `cpu_s` is the CPU time of all its processes.

    `cached_bytes` is the growth of source and result in the page cache; `dirty_bytes` the peak of
    dirty pages.
    """

    seconds: float
    cpu_s: float
    cached_bytes: int
    dirty_bytes: int


class Entry(Value, frozen=True, kw_only=True):
    """One contestant's runs of one case."""

    case: str
    contestant: str
    runs: list[Run]


class CaseTold(Value, frozen=True, kw_only=True):
    """A case as the page shows it. `argv` is convertd's qemu-img, empty if it ran none."""

    name: str
    source: str
    data_bytes: int
    argv: list[str]


class ContestantTold(Value, frozen=True, kw_only=True):
    """A contestant as the page shows it."""

    name: str
    what: str


class Answers(Value, frozen=True, kw_only=True):
    """The durations of unary calls, in seconds."""

    name: str
    seconds: list[float]


class Crowd(Value, frozen=True, kw_only=True):
    """Conversions by many callers at once: how long each took, and all of them."""

    contestant: str
    callers: int
    seconds: list[float]
    total_s: float


class Footprint(Value, frozen=True, kw_only=True):
    """Memory of one process, in KiB. 0 where it was not measured."""

    process: str
    fresh_pss_kib: int
    used_pss_kib: int
    peak_kib: int


class Trace(Value, frozen=True, kw_only=True):
    """When the steps of one conversion were reached, in milliseconds since the call."""

    marks: dict[str, float]


class Disk(Value, frozen=True, kw_only=True):
    """fio's sequential speed on the same disk, in bytes per second."""

    read_bytes_per_s: float
    write_bytes_per_s: float


class Machine(Value, frozen=True, kw_only=True):
    """The machine that was measured."""

    date: str
    cpu: str
    cores: int
    memory_mib: int
    kernel: str
    system: str
    file_system: str
    load: float
    versions: dict[str, str]


class Results(Value, frozen=True, kw_only=True):
    """All results of a run. `stolen` is the share of CPU time that the host gave to others."""

    settings: str
    minutes: float
    stolen: float
    machine: Machine
    contestants: list[ContestantTold]
    cases: list[CaseTold]
    entries: list[Entry]
    answers: list[Answers]
    crowds: list[Crowd]
    footprints: list[Footprint]
    traces: list[Trace]
    disk: Disk


def write(results: Results, path: Path) -> None:
    """Write the results to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")


def read(path: Path) -> Results:
    """Read results from a file.

    Raises:
        msgspec.ValidationError: another version of this program wrote them.
    """
    return msgspec.json.decode(path.read_bytes(), type=Results)
