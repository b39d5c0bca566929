"""What a caller's own process says of itself, for the audit record: its name, and its unit.

The kernel vouches for uid, gid and pid. These two are the process's word: it can name itself as it
likes, and by the time they are read its pid may be another's.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from convertd_daemon.linux import fsuid

if TYPE_CHECKING:
    from collections.abc import Iterator

UNIT_SUFFIXES: Final = (".service", ".scope", ".socket", ".mount", ".swap")
"""The kinds of unit that hold processes. Slices hold units."""


def name_and_unit(pid: int, uid: int, gid: int) -> tuple[str, str]:
    """Read the name of a process and its system unit; empty where the process's own user can't.

    Asked with the caller's ids, so it tells no more than the caller could see itself, and it works
    where /proc hides the processes of others (ProtectProc=invisible). Of a process with rights that
    the daemon lacks, root's for one, that /proc tells nothing. Source: proc(5), ptrace(2).
    """
    with _ids_for_files(uid, gid):
        name = _read(f"/proc/{pid}/comm").rstrip("\n")
        return name, unit_in(_read(f"/proc/{pid}/cgroup"))


def unit_in(cgroups: str) -> str:
    """The system unit in the text of a /proc/PID/cgroup: the outermost that is not a slice."""
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


@contextlib.contextmanager
def _ids_for_files(uid: int, gid: int) -> Iterator[None]:
    with contextlib.ExitStack() as undo:
        undo.callback(fsuid.setfsgid, os.getegid())
        fsuid.setfsgid(gid)
        undo.callback(fsuid.setfsuid, os.geteuid())
        fsuid.setfsuid(uid)
        yield
