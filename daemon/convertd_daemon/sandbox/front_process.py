"""Start the front's process.

Apart from what the broker then does with it, for the front takes longest to start: nothing here may
import much.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from convertd_daemon.linux import prctl, scm_rights
from convertd_daemon.sandbox import forking, identity

if TYPE_CHECKING:
    from convertd_daemon.sandbox.identity import Identity

CHANNEL_DESCRIPTOR: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The front's process, our child, and our end of its channel."""

    pid: int
    sock: socket.socket

    def end(self) -> None:
        """Kill and reap it, and close the channel. Does nothing if the channel is closed."""
        if self.sock.fileno() >= 0:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.sock.close()


def start(user: Identity, private: str) -> Started:
    """Start the front as its own user, with one descriptor, and a directory for its own socket.

    Raises:
        OSError: no process, or no descriptors, to be had.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    scm_rights.refuse(ours)
    with theirs:
        pid = forking.fork(
            lambda: _become_front(user, theirs.fileno(), private), keep=(theirs.fileno(),)
        )
    return Started(pid=pid, sock=ours)


def _become_front(user: Identity, descriptor: int, private: str) -> None:
    """In the child: give up root for good, then execute. No byte of gRPC is loaded before that."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # Ctrl-C in a terminal is for the broker, which then stops the front.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    forking.unblock_signals()  # or the program would have them blocked too
    if descriptor != CHANNEL_DESCRIPTOR:
        os.dup2(descriptor, CHANNEL_DESCRIPTOR)
        os.close(descriptor)
    os.set_inheritable(CHANNEL_DESCRIPTOR, True)
    identity.assume(user)
    identity.limit_capabilities(())
    prctl.set_no_new_privs()
    os.umask(0o077)
    os.chdir("/")
    environment = {
        **{key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"},
        # Its atfork handlers are for programs that fork; the front can't. Source: grpc's
        # doc/fork_support.md.
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        # gRPC's core logs what a peer sends, newlines included: a peer could forge lines of our
        # log. Source: grpc's doc/environment_variables.md.
        "GRPC_VERBOSITY": "NONE",
        # The relay reads from a peer into buffers of 64 KiB. In the heap they left gaps that
        # small objects then filled, and it grew by 1.1 KiB a call; with a mapping for each
        # buffer it does not grow (2,100 calls, 2026-11).
        "MALLOC_MMAP_THRESHOLD_": "32768",
        "MALLOC_ARENA_MAX": "1",
    }
    argv = [sys.executable, _isolation(), "-m", "convertd_daemon.front", private]
    os.execve(sys.executable, argv, environment)


def _isolation() -> str:
    """Keep from the front what the broker's own interpreter was kept from.

    As installed that is all of PYTHON* and the working directory; always it is the latter, which
    `-m` would put first in sys.path.
    """
    return "-I" if sys.flags.isolated else "-P"
