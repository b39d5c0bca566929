"""Have all contestants convert a case in turn, round after round, and compare the results."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks import idle, results, usage
from benchmarks.cases import Case
from benchmarks.command_lines import Failed
from benchmarks.contestants import Contestant

log = logging.getLogger(__name__)


class Turns:
    """One contestant's runs of a case. Once it fails, it has none, and no further turn."""

    def __init__(self, contestant: Contestant, device: usage.Device) -> None:
        self.contestant = contestant
        self._device = device
        self.runs: list[results.Run] = []
        self.failure = ""

    def take(self, case: Case, idle_timeout_s: float) -> None:
        """Convert when the disks are idle. The first result is compared with its source."""
        dest = case.source.path.with_name("result")
        is_first = not self.runs
        try:
            idle.await_disks(dest.parent, idle_timeout_s)
            self.runs.append(_run(case, self.contestant, self._device, dest))
            if is_first and self.contestant.copies:
                compare(case, dest)
        except (Failed, AssertionError, OSError, subprocess.SubprocessError) as error:
            self.failure = f"{type(error).__name__}: {error}"
            self.runs.clear()
            log.warning("%s: %s failed: %s", case.name, self.contestant.name, self.failure)
        finally:
            dest.unlink(missing_ok=True)

    def entry(self, case: Case) -> results.Entry:
        """The results."""
        return results.Entry(
            case=case.name, contestant=self.contestant.name, runs=self.runs, failure=self.failure
        )


def convert(
    case: Case, contestants: Sequence[Contestant], idle_timeout_s: float
) -> list[results.Entry]:
    """Run a case. Each round begins with another contestant.

    A contestant that fails or has a wrong result gets no figures, but the reason.
    """
    device = usage.Device(case.source.path.parent)
    turns = [Turns(one, device) for one in contestants if takes_part(one, case)]
    for number in range(case.rounds):
        shift = number % len(turns)
        for one in (*turns[shift:], *turns[:shift]):
            if not one.failure:
                one.take(case, idle_timeout_s)
    return [one.entry(case) for one in turns]


def takes_part(contestant: Contestant, case: Case) -> bool:
    """Whether a contestant is to convert a case, and can."""
    chosen = not case.row.contestants or contestant.name in case.row.contestants
    return chosen and contestant.takes_part(case)


def warm_up(case: Case, contestants: Sequence[Contestant]) -> None:
    """Have each contestant convert once: the first time, programs are read from the disk."""
    dest = case.source.path.with_name("result")
    for one in contestants:
        if takes_part(one, case):
            try:
                one.convert(case, dest)
            except Failed as error:
                log.warning("%s failed to convert: %s", one.name, error)
            finally:
                dest.unlink(missing_ok=True)


def prepare(case: Case) -> None:
    """Read the source into the page cache, or drop it from there."""
    for path in case.source.files:
        usage.read(path) if case.row.warm else usage.drop(path)


def _run(case: Case, contestant: Contestant, device: usage.Device, dest: Path) -> results.Run:
    prepare(case)
    cached_before, written_before = usage.cached_bytes(*case.source.files), device.written_bytes()
    with usage.DirtyPages() as dirty:
        took = contestant.convert(case, dest)
    cached = usage.cached_bytes(*case.source.files, dest) - cached_before
    flush = ["sync", "--file-system", str(dest.parent)]
    subprocess.run(flush, check=True)
    log.info("%-44s %-12s %9.3f s", case.name, contestant.name, took.seconds)
    return results.Run(
        seconds=took.seconds,
        cpu_s=took.cpu_s,
        cached_bytes=cached,
        dirty_bytes=dirty.most_bytes,
        written_bytes=device.written_bytes() - written_before,
        method=took.method,
    )


def compare(case: Case, dest: Path) -> None:
    """Compare the guest-visible content of a result and its source.

    Raises:
        Failed: they differ.
    """
    formats = ("-f", case.source.format, "-F", case.row.dest_format)
    argv = ["qemu-img", "compare", "-T", "none", *formats, str(case.source.path), str(dest)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"wrong result: {(done.stdout or done.stderr).strip()}")
