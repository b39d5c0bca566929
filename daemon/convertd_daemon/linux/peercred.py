"""unix(7), SO_PEERCRED and SO_PEERGROUPS: who called connect(2)."""

import array
import ctypes
import errno
import os
import select
import socket
import struct
from dataclasses import dataclass
from typing import Final

_UCRED: Final = "iII"
_SO_PEERGROUPS: Final = 59  # asm-generic/socket.h, since Linux 4.13; Python has no name for it
_NO_PEER: Final = 0xFFFFFFFF
_GID_BYTES: Final = 4
_FIRST_GUESS: Final = 64 * _GID_BYTES

_getsockopt = ctypes.CDLL(None, use_errno=True).getsockopt


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """A peer's identity when it called connect(2), in our user namespace.

    The pid is for logs only: it may be another process by now. An id that our namespace does not
    map is 65534.
    """

    pid: int
    uid: int
    gid: int


def peer_credentials(connection: socket.socket) -> Credentials:
    """Ask the kernel who connected.

    Raises:
        OSError: not a connected AF_UNIX socket.
    """
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(_UCRED))
    pid, uid, gid = struct.unpack(_UCRED, data)
    if pid <= 0 and uid == _NO_PEER:
        # The kernel returns (0, -1, -1), not an error, for an unconnected socket.
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
    return Credentials(pid=pid, uid=uid, gid=gid)


def group_count(connection: socket.socket) -> int:
    """Ask the kernel how many supplementary groups the peer has.

    Raises:
        OSError: not a connected AF_UNIX socket.
    """
    length = ctypes.c_uint32(0)
    arguments = (socket.SOL_SOCKET, _SO_PEERGROUPS, None, ctypes.byref(length))
    if _getsockopt(connection.fileno(), *arguments):
        error = ctypes.get_errno()
        if error != errno.ERANGE:
            raise OSError(error, f"SO_PEERGROUPS: {os.strerror(error)}")
    return length.value // _GID_BYTES


def peer_groups(connection: socket.socket) -> frozenset[int]:
    """Ask the kernel for all supplementary groups of the peer.

    Raises:
        OSError: not a connected AF_UNIX socket.
    """
    # socket.getsockopt() reads at most 1,024 bytes, 256 groups; the kernel allows 65,536.
    length = ctypes.c_uint32(_FIRST_GUESS)
    while True:
        buffer = ctypes.create_string_buffer(length.value)
        if not _getsockopt(
            connection.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, buffer, ctypes.byref(length)
        ):
            return frozenset(array.array("I", buffer.raw[: length.value]))
        error = ctypes.get_errno()
        # ERANGE: too short, and `length` is the size needed. It can't change in between: the kernel
        # keeps the groups that the peer had at connect(2).
        if error != errno.ERANGE or length.value <= len(buffer):
            raise OSError(error, f"SO_PEERGROUPS: {os.strerror(error)}")


def has_hung_up(connection: socket.socket) -> bool:
    """Whether the peer has ended a connection, or its own half, which counts for both."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))
