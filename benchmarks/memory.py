"""The memory of each of the daemon's processes."""

from __future__ import annotations

import contextlib
import threading
from typing import Self

from harness import processes
from harness.daemon import Daemon

from benchmarks import callers, results, usage
from benchmarks.callers import CallerProcess
from benchmarks.cases import Case


def idle_kib(daemon: Daemon) -> dict[str, int]:
    """The memory of each process, by its name, while nothing is converted."""
    found: dict[str, int] = {}
    for process in daemon.processes():
        found[process.name] = found.get(process.name, 0) + usage.pss_kib(process.pid)
    return found


class Peaks:
    """Samples in a thread the peak memory of processes, by their names."""

    def __init__(self, daemon: Daemon) -> None:
        self.kib: dict[str, int] = {}
        self._daemon = daemon
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(usage.SAMPLE_S / 10):
            for process in processes.of_session(self._daemon.pid):
                with contextlib.suppress(OSError, ValueError):  # it has ended meanwhile
                    peak = usage.peak_kib(process.pid)
                    self.kib[process.name] = max(self.kib.get(process.name, 0), peak)


def measure(
    daemon: Daemon, caller: CallerProcess, fresh: dict[str, int], load: tuple[Case, ...]
) -> list[results.Memory]:
    """Each process's memory: just started, after all conversions, and its peak meanwhile.

    The sampled conversions are not timed, because sampling takes time.
    """
    used = idle_kib(daemon)
    with Peaks(daemon) as peaks:
        for case in load:
            dest = case.source.path.with_name("watched")
            caller.call("convert", callers.convert_call(case, dest))
            dest.unlink()
    daemon.await_none("qemu-img")
    return [
        results.Memory(
            process=name,
            fresh_pss_kib=fresh.get(name, 0),
            used_pss_kib=used.get(name, 0),
            peak_kib=peaks.kib.get(name, 0),
        )
        for name in sorted({*fresh, *used, *peaks.kib})
    ]
