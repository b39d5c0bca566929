"""Small conversions by one caller and by many at once: convertd, Nova's helper and qemu-img."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from harness.daemon import Daemon

from benchmarks import callers, command_lines, contestants, idle, results
from benchmarks.callers import CallerProcess
from benchmarks.cases import Case
from benchmarks.command_lines import Failed
from benchmarks.settings import Settings

PROCESSES: Final = 8
"""convertd's callers are threads of so many processes, so that one Python is not the bottleneck."""

Dests = list[list[Path]]
"""The results of each caller, which makes them one after the other."""


def measure(
    daemon: Daemon, nova: CallerProcess, case: Case, settings: Settings
) -> list[results.Throughput]:
    """Have each number of callers convert, by each contestant in turn, some rounds long."""
    participants: list[Callable[[Dests], results.Throughput]] = [
        functools.partial(_convertd, daemon, case),
        functools.partial(_nova, nova, case),
        functools.partial(_qemu_img, case),
    ]
    found = []
    for number in settings.callers:
        dests = _dests(case, number, max(1, settings.calls // number))
        for one in range(settings.caller_rounds):
            shift = one % len(participants)
            for convert in (*participants[shift:], *participants[:shift]):
                idle.await_disks(case.source.path.parent, settings.idle_timeout)
                try:
                    found.append(_complete(convert(dests), dests))
                finally:
                    for dest in itertools.chain(*dests):
                        dest.unlink(missing_ok=True)
    return found


def _complete(found: results.Throughput, dests: Dests) -> results.Throughput:
    """The same, if all conversions succeeded.

    Raises:
        Failed: some did not; standard error says why.
    """
    missing = sum(map(len, dests)) - len(found.seconds)
    if missing:
        raise Failed(f"{found.contestant}: {missing} conversions of {found.callers} callers failed")
    return found


def _dests(case: Case, number: int, each: int) -> Dests:
    return [
        [case.source.path.with_name(f"result-{caller}-{one}") for one in range(each)]
        for caller in range(number)
    ]


def _convertd(daemon: Daemon, case: Case, dests: Dests) -> results.Throughput:
    shares = [share for share in (dests[number::PROCESSES] for number in range(PROCESSES)) if share]
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(callers.caller(daemon.socket)) for _ in shares]
        for process in processes:
            process.call("access", 1)
        for process, share in zip(processes, shares, strict=True):
            loads = [[callers.convert_call(case, dest) for dest in row] for row in share]
            process.send("concurrently", loads)
        replies = [process.reply() for process in processes]
    began, ended = zip(*(reply["span"] for reply in replies), strict=True)
    return results.Throughput(
        contestant=contestants.CONVERTD,
        callers=len(dests),
        seconds=[second for reply in replies for second in reply["seconds"]],
        total_s=max(ended) - min(began),
    )


def _nova(nova: CallerProcess, case: Case, dests: Dests) -> results.Throughput:
    loads = [[callers.nova_call(case, dest) for dest in row] for row in dests]
    reply = nova.call("concurrently", loads)
    began, ended = reply["span"]
    return results.Throughput(
        contestant=contestants.Nova.name,
        callers=len(dests),
        seconds=reply["seconds"],
        total_s=ended - began,
    )


def _qemu_img(case: Case, dests: Dests) -> results.Throughput:
    seconds: list[float] = []

    def work(row: list[Path]) -> None:
        for dest in row:
            commands = command_lines.nova_argv(case, dest) or []
            seconds.append(command_lines.run(commands).seconds)

    threads = [threading.Thread(target=work, args=(row,)) for row in dests]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results.Throughput(
        contestant=contestants.NOVA_ARGV,
        callers=len(dests),
        seconds=seconds,
        total_s=time.monotonic() - began,
    )
