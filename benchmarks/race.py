"""Run all contestants on a case in turn, round after round, and compare the results."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks import cases, disk, measured, usage
from benchmarks.cases import Case
from benchmarks.peers import Failed, Racer

log = logging.getLogger(__name__)


def race(case: Case, racers: Sequence[Racer], patience_s: float) -> list[measured.Entry]:
    """Run a case, each time with idle disks. Each round begins with another contestant.

    Raises:
        Failed: a result differs from its source.
    """
    entered = [racer for racer in racers if racer.enters(case)]
    entries = [measured.Entry(case=case.name, contestant=racer.name, runs=[]) for racer in entered]
    pairs = list(zip(entries, entered, strict=True))
    for number in range(case.rounds):
        shift = number % len(pairs)
        for entry, racer in (*pairs[shift:], *pairs[:shift]):
            dest = case.source.path.with_name("result")
            disk.settle(dest.parent, patience_s)
            entry.runs.append(_run(case, racer, dest))
            if number == 0 and racer.copies:
                check(case, racer.name, dest)
            dest.unlink()
    return entries


def warm_up(case: Case, racers: Sequence[Racer]) -> None:
    """Have each contestant convert once: the first time, programs are read from the disk."""
    dest = case.source.path.with_name("result")
    for racer in racers:
        if racer.enters(case):
            racer.convert(case, dest)
            dest.unlink()


def prepare(case: Case) -> None:
    """Read the source into the page cache, or drop it from there."""
    {cases.COLD: usage.forget, cases.WARM: usage.remember}[case.cache](case.source.path)


def _run(case: Case, racer: Racer, dest: Path) -> measured.Run:
    source = case.source.path
    prepare(case)
    before = usage.cached_bytes(source)
    with usage.DirtyPages() as dirty:
        took = racer.convert(case, dest)
    after = usage.cached_bytes(source, dest)
    log.info("%-36s %-12s %9.3f s", case.name, racer.name, took.seconds)
    return measured.Run(
        seconds=took.seconds,
        cpu_s=took.cpu_s,
        cached_bytes=after - before,
        dirty_bytes=dirty.most_bytes,
    )


def check(case: Case, name: str, dest: Path) -> None:
    """Compare the guest-visible content of a result and its source.

    Raises:
        Failed: they differ.
    """
    formats = ("-f", case.source.format, "-F", case.dest_format)
    argv = ["qemu-img", "compare", "-T", "none", *formats, str(case.source.path), str(dest)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{name} on {case.name}: {done.stdout or done.stderr}")
