"""The public socket: systemd's, or one of our own."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import socket
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from convertd_daemon.linux import scm_rights
from convertd_daemon.policy import path_walk, writers
from convertd_daemon.service.preflight import StartError

if TYPE_CHECKING:
    from collections.abc import Callable

FIRST_PASSED: Final = 3
"""The first descriptor that systemd passes. Source: sd_listen_fds(3)."""

BACKLOG: Final = 1024

MODE: Final = 0o666
"""Every user may connect; the policy decides, not the socket's mode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """The listening socket, and its path if the daemon must remove it."""

    sock: socket.socket
    own_path: str

    def close(self, end: Callable[[socket.socket], object] = socket.socket.detach) -> None:
        """Stop listening; `end` closes the connections that were not accepted yet.

        Their peers may have sent descriptors: then they stay open until this process exits, which
        does not block (see closer.py). A socket of systemd's stays open too, with its backlog, and
        its path stays: systemd listens on it until the next start.

        A second call does nothing: by then the path may be the next daemon's.
        """
        if self.sock.fileno() == -1:
            return
        if not self.own_path:
            self.sock.detach()
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.own_path)
        # From now on new connections are refused; those in the backlog are the last.
        self.sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            while True:
                end(self.sock.accept()[0])
        self.sock.close()


def listen(path: str) -> Listener:
    """Take the socket that systemd passed, or make one at `path`.

    Raises:
        StartError: what was passed is not one listening local socket, or another daemon listens at
            the path, or something else is there.
    """
    passed = _passed()
    if passed is not None:
        scm_rights.refuse(passed)
        return Listener(sock=passed, own_path="")
    path = trusted(path)
    return Listener(sock=_make(path), own_path=path)


def _passed() -> socket.socket | None:
    """The descriptor of socket activation. Removes its variables from the environment."""
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal() or int(count) == 0:
        return None
    if int(count) != 1:
        raise StartError(f"systemd passed {count} sockets, not one")
    os.set_inheritable(FIRST_PASSED, False)
    if not _is_ours(FIRST_PASSED):
        raise StartError("what systemd passed is not a listening AF_UNIX stream socket")
    sock = socket.socket(fileno=FIRST_PASSED)
    sock.setblocking(False)
    return sock


def _is_ours(descriptor: int) -> bool:
    """Whether that is a socket of the kind that we would make ourselves."""
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return False
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return (sock.family, sock.type, listening) == (socket.AF_UNIX, socket.SOCK_STREAM, 1)


def _make(path: str) -> socket.socket:
    """Bind, set the mode, listen. Connections before listen(2) are refused.

    By its path, along which only root can change anything: `trusted` has checked that.
    """
    _clear(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.bind(path)
        os.chmod(path, MODE)
        scm_rights.refuse(sock)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise StartError(f"can't listen at {path}: {os.strerror(error.errno or 0)}") from error
    return sock


def trusted(path: str) -> str:
    """Give a socket's path with no link on its way, along which root alone can change anything.

    A sticky directory of root's will do: no other user can rename or remove what is root's there.

    Raises:
        StartError: its directory is missing, or others could put another in its place.
    """
    directory = os.path.realpath(os.path.dirname(path))
    if not os.path.exists(directory):
        how = f"install -d -m 755 {shlex.quote(directory)}"
        raise StartError(f"there is no directory {directory} for the socket; make it with: {how}")
    if not os.path.isdir(directory):
        raise StartError(f"{directory}: is not a directory")
    with contextlib.ExitStack() as stack:
        try:
            for step in path_walk.steps(directory, stack):
                if others := writers.of(step, below_uid=0):
                    raise StartError(
                        f"{directory}: others than root may put a socket there: {others}"
                    )
        except OSError as error:
            raise StartError(path_walk.reason(error)) from error
    return os.path.join(directory, os.path.basename(path))


def _clear(path: str) -> None:
    """Remove a socket on which no process listens, and nothing else.

    Raises:
        StartError: a process listens, or it is no socket.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise StartError(f"{path}: exists, and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        answer = probe.connect_ex(path)
    if answer != errno.ECONNREFUSED:
        raise StartError(f"{path}: another daemon listens there")
    os.unlink(path)
