"""The file with the counters, for node_exporter: written whole, by a child process.

The policy names its directory, which may be another user's, or on a file system that another user
serves. So nothing is opened there that a link or a FIFO could redirect or block. A child does it,
for open(2) itself can block for as long as that file system likes.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import signal
import stat
import time
from typing import Final

from convertd_core import validation
from convertd_daemon.linux import getrandom, openat2, prctl
from convertd_daemon.sandbox import forking

log = logging.getLogger(__name__)

LIMIT_S: Final = 10.0
"""How long one write may last. If a child can't be killed, no other one is started."""

LAST_S: Final = 2.0
"""How long the daemon waits for the last write when it stops."""

MODE: Final = 0o644
"""Whatever the umask: node_exporter is another user."""

OLD_S: Final = 60.0

MOST_LOOKED_AT: Final = 4096
"""So many entries of the directory are looked at for what a killed daemon left."""

PREFIX: Final = f"{validation.TEMPORARY_PREFIX}counters-"
TEMPORARY: Final = re.compile(re.escape(PREFIX) + r"[0-9a-f]{16}\.tmp")


class Writer:
    """Writes the file, at most once at a time."""

    def __init__(self) -> None:
        self.pid = 0

    def write(self, path: str, data: bytes) -> None:
        """Have a child write it. The child logs errors; call `ended` when it is reaped."""
        if self.pid:
            log.warning("the last write of the counters has not ended file=%r", path)
            return
        try:
            self.pid = forking.fork(lambda: _write_in_child(path, data))
        except OSError as error:
            log.warning("can't write counters file=%r error=%s", path, error)

    def ended(self, pid: int) -> bool:
        """Note that a child was reaped; True if it was the writer's."""
        ours = pid == self.pid != 0
        if ours:
            self.pid = 0
        return ours

    def finish(self) -> None:
        """Wait up to LAST_S for a write, when the broker reaps no more children."""
        if self.pid and forking.reap(self.pid, LAST_S):
            self.pid = 0


def _write_in_child(path: str, data: bytes) -> None:
    """Write the file, and be killed if that takes too long."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    forking.unblock_signals()
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    prctl.set_name("convertd-counts")
    try:
        write(path, data)
    except OSError as error:
        log.warning("can't write counters file=%r error=%s", path, error)


def write(path: str, data: bytes) -> None:
    """Write the file anew, at once: a reader sees the one before or this one.

    Whatever has the name is replaced and not opened; a directory stays, and is an error. Links on
    the way are not followed.

    Raises:
        OSError: it could not be written. Nothing is left of it.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY
    resolve = openat2.Resolve.NO_SYMLINKS | openat2.Resolve.NO_MAGICLINKS
    directory = openat2.openat2(
        openat2.AT_FDCWD, os.path.dirname(path), flags=flags, resolve=resolve
    )
    try:
        _tidy(directory)
        _replace(directory, os.path.basename(path), data)
    finally:
        os.close(directory)


def _replace(directory: int, name: str, data: bytes) -> None:
    temporary = f"{PREFIX}{getrandom.hex_name(8)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600, dir_fd=directory)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(fd, MODE)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
        raise


def _tidy(directory: int) -> None:
    """Remove what a daemon that was killed left: old, of that very name, and our own.

    Whoever fills the directory with names costs us neither memory nor time for all of them.
    """
    with os.scandir(directory) as entries:
        names = [entry.name for entry in itertools.islice(entries, MOST_LOOKED_AT)]
    for name in filter(TEMPORARY.fullmatch, names):
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(name, dir_fd=directory, follow_symlinks=False)
            ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
            if ours and time.time() - found.st_mtime > OLD_S:
                os.unlink(name, dir_fd=directory)
