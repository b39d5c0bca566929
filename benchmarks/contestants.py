"""Who converts: command lines, Nova through oslo.privsep, and convertd."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

from harness.daemon import Daemon

from benchmarks import callers, command_lines, usage
from benchmarks.callers import CallerProcess
from benchmarks.cases import Case
from benchmarks.command_lines import Took

CONVERTD: Final = "convertd"
NOVA_ARGV: Final = "nova argv"
SAME_ARGV: Final = "same argv"
FIO: Final = "fio"

CONVERTD_COPYING: Final = "convertd, reflink never"

NOT_PEERS: Final = frozenset({CONVERTD, CONVERTD_COPYING, SAME_ARGV, FIO})
"""Whom convertd is not compared with, when it is compared with the best of all others."""

RAN: Final = re.compile(r"run command=(qemu-img convert .*)$", re.MULTILINE)
"""The daemon's debug message about a qemu-img that it runs."""


class Contestant(Protocol):
    """A program or service that converts."""

    @property
    def name(self) -> str:
        """A name for tables."""

    @property
    def description(self) -> str:
        """Its description, in a sentence."""

    @property
    def copies(self) -> bool:
        """Whether its result is to be compared with the source."""

    def takes_part(self, case: Case) -> bool:
        """Whether it takes part in a case."""

    def convert(self, case: Case, dest: Path) -> Took:
        """Convert. `dest` does not exist.

        Raises:
            Failed: the conversion failed.
        """


class CommandLine:
    """Commands that this process runs one after the other."""

    copies = True

    def __init__(self, name: str, commands: command_lines.CommandLine) -> None:
        self.name = name
        self.description = " ".join((commands.__doc__ or "").split())
        self._commands = commands

    def takes_part(self, case: Case) -> bool:
        """See Contestant."""
        return self._commands(case, Path("/dest")) is not None

    def convert(self, case: Case, dest: Path) -> Took:
        """See Contestant."""
        return command_lines.run(self._commands(case, dest) or [])


class SameArgv:
    """qemu-img alone, with convertd's arguments: the difference is convertd's own cost."""

    name = SAME_ARGV
    description = (
        "qemu-img alone, with the arguments that convertd gives it, as it logs them at debug."
    )
    copies = True

    def __init__(self, argv: Mapping[str, list[str]]) -> None:
        self._argv = argv

    def takes_part(self, case: Case) -> bool:
        """See Contestant."""
        return bool(self._argv.get(case.name))

    def convert(self, case: Case, dest: Path) -> Took:
        """See Contestant."""
        return command_lines.run([[*self._argv[case.name][:-1], str(dest)]])


class Convertd:
    """The daemon, called over one connection by an unprivileged user."""

    name = CONVERTD
    description = "The daemon, called through `convertd_client.Client` by a user without rights."
    copies = True

    _reflink = "auto"

    def __init__(self, daemon: Daemon, caller: CallerProcess) -> None:
        self._daemon = daemon
        self._caller = caller

    def takes_part(self, case: Case) -> bool:
        """See Contestant."""
        del case
        return True

    def convert(self, case: Case, dest: Path) -> Took:
        """See Contestant."""
        before = usage.cpu_s(self._daemon.pid)
        reply = self._caller.call("convert", callers.convert_call(case, dest, self._reflink))
        self._daemon.await_none("qemu-img")
        return Took(
            seconds=reply["seconds"],
            cpu_s=usage.cpu_s(self._daemon.pid) - before,
            method=reply["method"],
        )


class ConvertdCopying(Convertd):
    """The same with `reflink=never`, measured only where blocks can't be shared anyway."""

    name = CONVERTD_COPYING
    description = (
        "The same with `reflink=never`: what it costs to find out that blocks can't be shared."
    )

    _reflink = "never"

    def takes_part(self, case: Case) -> bool:
        """See Contestant."""
        return self.name in case.row.contestants


class Nova:
    """Nova's own function, run by oslo.privsep's helper."""

    name = "nova"
    description = (
        "Nova 34's own `nova.privsep.qemu.convert_image`, called by a user without rights and run "
        "by oslo.privsep's helper, which is root. It runs `nova argv`, so only small conversions, "
        "in which the call itself counts, are measured."
    )
    copies = True

    def __init__(self, caller: CallerProcess) -> None:
        self.caller = caller

    def takes_part(self, case: Case) -> bool:
        """See Contestant."""
        return case.row.small

    def convert(self, case: Case, dest: Path) -> Took:
        """See Contestant."""
        before = usage.cpu_s(self.caller.process.pid)
        seconds = self.caller.call("convert", callers.nova_call(case, dest))
        return Took(seconds=seconds, cpu_s=usage.cpu_s(self.caller.process.pid) - before)


def qemu_arguments(verbose: Daemon, caller: CallerProcess, case: Case, dest: Path) -> list[str]:
    """Convert once, and return qemu-img's arguments, with paths instead of descriptors.

    Empty if the daemon ran no `qemu-img convert`.
    """
    before = len(verbose.log)
    caller.call("convert", callers.convert_call(case, dest))
    found = RAN.findall(verbose.log[before:])
    if not found:
        return []
    *argv, graph, _ = shlex.split(found[-1])
    source = re.sub(r"/proc/self/fd/\d+", lambda _: str(case.source.path), graph)
    return [*argv, source, "DEST"]
