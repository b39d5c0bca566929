"""Where the time of one small conversion goes, from the caller's call to its result.

The daemon runs under strace, which stops it only at the few system calls that mark a step
(--seccomp-bpf). The clock is the real-time clock, the only one that strace prints in full.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.daemon import Daemon

from benchmarks import callers, results
from benchmarks.cases import Case
from benchmarks.settings import Settings

CALLS: Final = "openat2,linkat,fsync"

LINE: Final = re.compile(r"(?P<pid>\d+) +(?P<time>\d+\.\d+) (?P<call>.*)")


@dataclass(frozen=True, slots=True)
class Mark:
    """A step's end: the first matching line after the end of the step before it."""

    name: str
    pattern: re.Pattern[str]


MARKS: Final = (
    Mark("the job opens the source", re.compile(r"openat2\(.*")),
    Mark("the result is written", re.compile(r"fsync\(.*")),
    Mark("the result is flushed, and gets its name", re.compile(r"linkat\(.*")),
    Mark("its directory is to be flushed", re.compile(r"fsync\(.*")),
)
"""convertd copies a small raw image without running a program."""

CALLED: Final = "the call is made"
ANSWERED: Final = "flushed; the caller has the result"


def trace(images: Path, case: Case, settings: Settings) -> list[results.Trace]:
    """Convert some times under strace, and return when each step was reached."""
    daemon = Daemon(callers.policy(images))
    log = daemon.home / "strace"
    wrapper = ("strace", "-f", "--seccomp-bpf", "-ttt", "-s", "256", "-e", f"trace={CALLS}")
    traces = []
    try:
        daemon.start(wrapper=(*wrapper, "-o", str(log)), options=())
        with callers.caller(daemon.socket) as caller:
            caller.call("access", 1)
            for _ in range(settings.traces):
                dest = case.source.path.with_name("traced")
                began, ended = caller.call("timeline", callers.convert_call(case, dest))
                dest.unlink()
                traces.append(_trace(log.read_text(errors="replace"), began, ended))
    finally:
        daemon.discard()
    return traces


def _trace(text: str, began: float, ended: float) -> results.Trace:
    marks = {CALLED: 0.0}
    lines = [match for line in text.splitlines() if (match := LINE.fullmatch(line))]
    within = [line for line in lines if began <= float(line["time"]) <= ended]
    for mark, at in _found(within):
        marks[mark] = (at - began) * 1000
    marks[ANSWERED] = (ended - began) * 1000
    return results.Trace(marks=marks)


def _found(lines: Sequence[re.Match[str]]) -> list[tuple[str, float]]:
    found, rest = [], list(lines)
    for mark in MARKS:
        for number, line in enumerate(rest):
            if mark.pattern.match(line["call"]):
                found.append((mark.name, float(line["time"])))
                rest = rest[number + 1 :]
                break
    return found
