"""The results as values, written and read as JSON."""

from __future__ import annotations

from pathlib import Path

import msgspec


class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the results."""


class Run(Value, frozen=True, kw_only=True):
    """One conversion. `cpu_s` is the CPU time of all its processes.

    `cached_bytes` is the growth of source and result in the page cache; `dirty_bytes` the peak of
    dirty pages; `written_bytes` what the disk was given to write, until all was on it. `method` is
    how convertd did it, as its reply says; others don't say.
    """

    seconds: float
    cpu_s: float
    cached_bytes: int
    dirty_bytes: int
    written_bytes: int
    method: str


class Entry(Value, frozen=True, kw_only=True):
    """One contestant's runs of one case. If it failed, there are none, and `failure` says why."""

    case: str
    contestant: str
    runs: list[Run]
    failure: str = ""


class CaseInfo(Value, frozen=True, kw_only=True):
    """A case as the page shows it. `argv` is convertd's qemu-img, empty if it ran none."""

    name: str
    row: str
    disk: str
    source: str
    data_bytes: int
    argv: list[str]


class ContestantInfo(Value, frozen=True, kw_only=True):
    """A contestant as the page shows it."""

    name: str
    description: str


class Latency(Value, frozen=True, kw_only=True):
    """The durations of unary calls, in seconds."""

    name: str
    seconds: list[float]


class Throughput(Value, frozen=True, kw_only=True):
    """Conversions by several callers at once: how long each took, and all of them."""

    contestant: str
    callers: int
    seconds: list[float]
    total_s: float


class Memory(Value, frozen=True, kw_only=True):
    """Memory of one process, in KiB. 0 where it was not measured."""

    process: str
    fresh_pss_kib: int
    used_pss_kib: int
    peak_kib: int


class Trace(Value, frozen=True, kw_only=True):
    """When the steps of one conversion were reached, in milliseconds since the call."""

    marks: dict[str, float]


class DiskInfo(Value, frozen=True, kw_only=True):
    """A disk, and fio's sequential speed on it, in bytes per second."""

    name: str
    description: str
    file_system: str
    direct_read: float
    direct_write: float
    buffered_read: float
    buffered_write: float


class Machine(Value, frozen=True, kw_only=True):
    """The machine that was measured."""

    date: str
    cpu: str
    cores: int
    memory_mib: int
    kernel: str
    system: str
    load: float
    versions: dict[str, str]


class Results(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """All results of a run, filled as it goes on.

    `complete` is whether it was to measure all that the page shows, with images of full size.
    `stolen` is the share of CPU time that the host gave to others. `failures` are the parts that
    could not be measured, with the reason; a contestant's own are in its entries.
    """

    settings: str
    machine: Machine
    complete: bool = True
    minutes: float = 0.0
    stolen: float = 0.0
    contestants: list[ContestantInfo] = []
    disks: list[DiskInfo] = []
    cases: list[CaseInfo] = []
    entries: list[Entry] = []
    latencies: list[Latency] = []
    throughputs: list[Throughput] = []
    memory: list[Memory] = []
    traces: list[Trace] = []
    failures: list[str] = []


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
