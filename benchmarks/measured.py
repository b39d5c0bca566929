"""What was measured, as values; written and read as JSON."""

from __future__ import annotations

from pathlib import Path

import msgspec


class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the results."""


class Run(Value, frozen=True, kw_only=True):
    """One conversion. `cpu_s` is of all processes that took part.

    `cached_bytes` are the pages of source and result in the page cache at the end, beyond those
    there at the beginning; `dirty_bytes` is the most that waited to be written meanwhile.
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
    """A case as the page tells of it. `argv` is what convertd ran, if it ran qemu-img at all."""

    name: str
    source: str
    data_bytes: int
    argv: list[str]


class ContestantTold(Value, frozen=True, kw_only=True):
    """A contestant as the page tells of it."""

    name: str
    what: str


class Answers(Value, frozen=True, kw_only=True):
    """How long calls took that have one answer, in seconds."""

    name: str
    seconds: list[float]


class Crowd(Value, frozen=True, kw_only=True):
    """Conversions by many callers at once: how long each took, and all of them."""

    contestant: str
    callers: int
    seconds: list[float]
    total_s: float


class Footprint(Value, frozen=True, kw_only=True):
    """Memory of one process, in KiB. 0 where it was not looked at."""

    process: str
    fresh_pss_kib: int
    used_pss_kib: int
    peak_kib: int


class Trace(Value, frozen=True, kw_only=True):
    """When the steps of one conversion were reached, in milliseconds since the call."""

    marks: dict[str, float]


class Disk(Value, frozen=True, kw_only=True):
    """What fio read and wrote sequentially on the same disk, in bytes per second."""

    read_bytes_per_s: float
    write_bytes_per_s: float


class Machine(Value, frozen=True, kw_only=True):
    """What it was measured on."""

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
    """All of a run. `stolen` is the share of the processors' time that the host gave to others."""

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
    """Keep the results in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")


def read(path: Path) -> Results:
    """Take them from there.

    Raises:
        msgspec.ValidationError: they are of another version of this program.
    """
    return msgspec.json.decode(path.read_bytes(), type=Results)
