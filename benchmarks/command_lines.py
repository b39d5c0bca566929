"""Command lines that convert an image. To add one, write a function and name it in COMMANDS.

A function gives the commands to be run one after the other, or None if it takes no part in a case.
Its docstring goes into the page.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.cases import Case

ENVIRONMENT: Final = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "MALLOC_ARENA_MAX": "1"}
"""That of all programs that are measured: convertd's qemu-img has the same."""

TIMEOUT_S: Final = 600
"""After which a program is killed that has not ended."""

Commands = list[list[str]]
CommandLine = Callable[[Case, Path], Commands | None]


class Failed(Exception):
    """A contestant or the daemon failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Took:
    """The cost of one conversion. `cpu_s` is the CPU time of all its processes.

    `method` is how convertd did it; others don't say.
    """

    seconds: float
    cpu_s: float
    method: str = ""


def nova_argv(case: Case, dest: Path) -> Commands | None:
    """qemu-img with the arguments that Nova 34 gives it. Source: nova/privsep/qemu.py.

    Nova knows no zstd: there its `-c` runs, which is zlib.
    """
    argv = ["qemu-img", "convert", "-t", "none", "-O", case.row.dest_format]
    argv += _declared(case)
    argv += ["-c"] if case.row.compression else []
    return [[*argv, str(case.source.path), str(dest)]]


def vdsm(case: Case, dest: Path) -> Commands | None:
    """qemu-img with the arguments that oVirt's vdsm gives it.

    With compression they are nearly Nova's, and are not measured.
    Source: vdsm, lib/vdsm/storage/qemuimg.py, convert().
    """
    if case.row.compression:
        return None
    argv = ["qemu-img", "convert", "-p", "-t", "none", "-T", "none", *_declared(case)]
    argv += ["-O", case.row.dest_format]
    argv += ["-o", "compat=1.1"] if case.row.dest_format == "qcow2" else []
    return [[*argv, str(case.source.path), str(dest)]]


def cdi(case: Case, dest: Path) -> Commands | None:
    """qemu-img with the arguments that KubeVirt's CDI gives it, which converts to raw alone.

    Source: containerized-data-importer, pkg/image/qemu.go, convertToRaw() and getCacheMode().
    """
    if case.row.dest_format != "raw":
        return None
    argv = ["qemu-img", "convert", "-t", "writeback", "-p", "-O", "raw"]
    return [[*argv, str(case.source.path), str(dest)]]


def cp(case: Case, dest: Path) -> Commands | None:
    """`cp --reflink=auto --sparse=always`, then `sync`: a copy, of one file to the same format."""
    is_copy = case.row.dest_format == case.source.format and not case.source.backing
    if not is_copy or case.row.compression:
        return None
    copy = ["cp", "--reflink=auto", "--sparse=always", str(case.source.path), str(dest)]
    return [copy, ["sync", str(dest)]]


def nbdcopy(case: Case, dest: Path) -> Commands | None:
    """nbdcopy, of libnbd, between two qemu-nbd, past the page cache, flushed at the end."""
    if case.row.compression or case.row.undeclared:
        return None
    serve = ["qemu-nbd", "--cache=none", "--aio=native", "--discard=unmap"]
    create = ["qemu-img", "create", "-q", "-f", case.row.dest_format, str(dest)]
    return [
        [*create, str(case.source.virtual_bytes)],
        [
            *("nbdcopy", "--flush", "--destination-is-zero", "--"),
            *("[", *serve, "--read-only", "-f", case.source.format, str(case.source.path), "]"),
            *("[", *serve, "-f", case.row.dest_format, str(dest), "]"),
        ],
    ]


COMMANDS: Final[Mapping[str, CommandLine]] = {
    "nova argv": nova_argv,
    "vdsm argv": vdsm,
    "cdi argv": cdi,
    "cp": cp,
    "nbdcopy": nbdcopy,
}


def _declared(case: Case) -> list[str]:
    return [] if case.row.undeclared else ["-f", case.source.format]


def run(commands: Sequence[Sequence[str]]) -> Took:
    """Run commands one after the other.

    Raises:
        Failed: one exited with a status other than 0, or not within TIMEOUT_S.
    """
    cpu_s = 0.0
    began = time.monotonic()
    for argv in commands:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=ENVIRONMENT,
        )
        killer = threading.Timer(TIMEOUT_S, os.kill, (process.pid, signal.SIGKILL))
        killer.start()
        try:
            _, status, used = os.wait4(process.pid, 0)
        finally:
            killer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        cpu_s += used.ru_utime + used.ru_stime
        if process.returncode:
            raise Failed(f"{argv} ended with {process.returncode}")
    return Took(seconds=time.monotonic() - began, cpu_s=cpu_s)
