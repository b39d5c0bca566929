"""Temporary names of results, and the removal of those that killed jobs left.

Two forms, each with 16 random hexadecimal digits:

- `.convertd-RANDOM.tmp`: it only ever leads to a result.
- `.convertd-RANDOM-NEW-OLD.tmp`: it is exchanged with the destination's name, so it leads to the
  result, whose inode number is NEW, or to what was there before: OLD if that is the file that was
  judged beforehand to be replaceable. Any other inode is a file that another process put there in
  between; it is never removed.

The job that makes either locks the result with flock(2) for as long as it lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import stat
from collections.abc import Callable
from typing import Final

from convertd_core import validation
from convertd_daemon.job.files import paths
from convertd_daemon.linux import getrandom

PREFIX: Final = validation.TEMPORARY_PREFIX

_NAME: Final = re.compile(
    re.escape(PREFIX) + r"[0-9a-f]{16}(?:-(?P<new>[0-9a-f]{1,16})-(?P<old>[0-9a-f]{1,16}))?\.tmp"
)

Rights = Callable[[], contextlib.AbstractContextManager[None]]
"""A context manager that takes on the rights of a user."""

MOST_EXAMINED: Final = 4096
"""The most names examined in one sweep, so that a directory full of them delays a job by no more
than 0.1 s."""


def new_name() -> str:
    """A name that leads to a result."""
    return f"{PREFIX}{getrandom.hex_name(8)}.tmp"


def new_name_to_exchange(new: int, old: int) -> str:
    """A name for the inode number `new`, to be exchanged with that of the inode number `old`."""
    return f"{PREFIX}{getrandom.hex_name(8)}-{new:x}-{old:x}.tmp"


def new_name_to_keep() -> str:
    """A name for what could not be given its own name back. No sweep removes it."""
    return f"{PREFIX}kept-{getrandom.hex_name(8)}"


def sweep(directory: int, owner: int, removing: Rights = contextlib.nullcontext) -> None:
    """Remove the temporaries of jobs that no longer live and published for the uid `owner`.

    What belongs to another, is locked, or is not what its name says, stays; so does what may not be
    removed with the rights that `removing` takes on. Looking takes the daemon's own: what is
    still written is of a mode that lets not even its owner open it.
    """
    with os.scandir(directory) as entries:
        matches = filter(None, (_NAME.fullmatch(entry.name) for entry in entries))
        found = list(itertools.islice(matches, MOST_EXAMINED))
    for match in found:
        with contextlib.suppress(OSError):
            _remove_if_left(directory, match, owner, removing)


def _remove_if_left(directory: int, match: re.Match[str], owner: int, removing: Rights) -> None:
    with contextlib.ExitStack() as stack:
        found = paths.look_up(directory, match[0])
        stack.callback(os.close, found)
        status = os.fstat(found)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != owner:
            return
        if match["new"] and status.st_ino not in {int(match["new"], 16), int(match["old"], 16)}:
            return
        fd = paths.reopen(found, os.O_RDONLY | os.O_NONBLOCK)
        stack.callback(os.close, fd)
        # Enough to meet the job's, and all that NFS gives for reading. Source: flock(2).
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if not paths.is_in_use(fd):
            with removing():
                os.unlink(match[0], dir_fd=directory)
