"""What /proc says of a process and its threads. Source: proc_pid_status(5), proc_pid_stat(5)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process as it was when it was looked at."""

    pid: int
    parent: int
    session: int
    name: str
    state: str

    @property
    def is_over(self) -> bool:
        """Whether it has ended, and only its exit status waits to be taken."""
        return self.state in {"Z", "X"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Thread:
    """Who one thread is, and what it may do. Capabilities are bit masks."""

    name: str
    uids: tuple[int, ...]
    gids: tuple[int, ...]
    groups: frozenset[int]
    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int
    no_new_privs: int
    seccomp: int


LAZY_DESCRIPTORS: Final = 2
"""gRPC opens an eventfd or two when it first needs them."""


def of_session(session: int) -> list[Process]:
    """All processes of a session: a daemon, and whatever it started."""
    return [process for process in _all() if process.session == session]


def exists(pid: int) -> bool:
    """Whether there is a process of that number that has not ended."""
    found = _look(pid)
    return found is not None and not found.is_over


def state(pid: int) -> str:
    """One letter: R, S, D, T, Z, or nothing at all."""
    found = _look(pid)
    return found.state if found else ""


def threads(pid: int) -> list[Thread]:
    """Every thread of a process that runs."""
    found = []
    for tid in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            found.append(_thread(pid, tid))
    return found


def descriptors(pid: int) -> dict[int, str]:
    """What each open descriptor of a process leads to."""
    directory = f"/proc/{pid}/fd"
    found = {}
    for number in os.listdir(directory):
        try:
            found[int(number)] = os.readlink(f"{directory}/{number}")
        except FileNotFoundError:
            continue  # closed meanwhile
    return found


def mapped_files(pid: int) -> set[str]:
    """The files that a process has in its memory: programs and libraries."""
    with open(f"/proc/{pid}/maps", encoding="utf-8") as maps:
        return {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if "/" in line}


def argv(pid: int) -> list[str]:
    """The arguments that a process was executed with."""
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().decode().split("\0")[:-1]


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was executed with."""
    with open(f"/proc/{pid}/environ", "rb") as file:
        pairs = file.read().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if pair)


def anonymous_kib(pid: int) -> int:
    """The memory that a process has made for itself, in KiB, whoever was forked from it since.

    Source: proc_pid_status(5).
    """
    with open(f"/proc/{pid}/status", encoding="utf-8") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["RssAnon"].split()[0])


def _all() -> Iterator[Process]:
    for name in os.listdir("/proc"):
        if name.isdecimal() and (process := _look(int(name))):
            yield process


def _look(pid: int) -> Process | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            before, _, after = file.read().rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = after.split()
    return Process(
        pid=pid,
        name=before.partition("(")[2],
        state=fields[0],
        parent=int(fields[1]),
        session=int(fields[3]),
    )


def _thread(pid: int, tid: str) -> Thread:
    with open(f"/proc/{pid}/task/{tid}/status", encoding="utf-8") as file:
        said = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    return Thread(
        name=said["Name"],
        uids=tuple(int(item) for item in said["Uid"].split()),
        gids=tuple(int(item) for item in said["Gid"].split()),
        groups=frozenset(int(item) for item in said["Groups"].split()),
        inheritable=int(said["CapInh"], 16),
        permitted=int(said["CapPrm"], 16),
        effective=int(said["CapEff"], 16),
        bounding=int(said["CapBnd"], 16),
        ambient=int(said["CapAmb"], 16),
        no_new_privs=int(said["NoNewPrivs"]),
        seccomp=int(said["Seccomp"]),
    )


RENAMES: Final = {"x86_64": {82, 264, 316}, "aarch64": {38, 276}}
"""The numbers of rename, renameat and renameat2, as /proc/PID/syscall tells them."""


def is_about_to_rename(pid: int) -> bool:
    """Whether a process is held, as by strace, at the entry of a rename."""
    try:
        number = Path(f"/proc/{pid}/syscall").read_text(encoding="utf-8").split()[0]
    except (OSError, IndexError):
        return False
    return number.isdecimal() and int(number) in RENAMES[os.uname().machine]
