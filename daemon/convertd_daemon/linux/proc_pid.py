"""The name and the unit of a caller's process, for the audit record.

Unverified, unlike uid, gid and pid, which the kernel vouches for: a process can choose its name,
and another process may have its pid by the time these are read.
"""

from __future__ import annotations

from typing import Final

from convertd_daemon.linux import fsuid

UNIT_SUFFIXES: Final = (".service", ".scope", ".socket", ".mount", ".swap")
"""The kinds of unit that hold processes. Slices hold units."""


def name_and_unit(pid: int, uid: int, gid: int) -> tuple[str, str]:
    """Read the name of a process and its system unit; empty where its own user may not read them.

    Reads with the caller's ids, so it reveals no more than the caller could see, and works where
    /proc hides other users' processes (ProtectProc=invisible). For a process with capabilities that
    the daemon lacks, such as root's, that /proc shows nothing. Source: proc(5), ptrace(2).
    """
    with fsuid.file_access_as(uid, gid):
        name = _read(f"/proc/{pid}/comm").rstrip("\n")
        return name, unit_in(_read(f"/proc/{pid}/cgroup"))


def unit_in(cgroups: str) -> str:
    """Find the system unit in /proc/PID/cgroup's text: the outermost that is not a slice."""
    for line in cgroups.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers in {"", "name=systemd"}:
            for part in path.split("/"):
                if part.endswith(UNIT_SUFFIXES):
                    return part
    return ""


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="backslashreplace") as file:
            return file.read(65536)
    except OSError:
        return ""
