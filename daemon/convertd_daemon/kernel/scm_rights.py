"""unix(7), SCM_RIGHTS: a message, and descriptors that the other end gets its own copies of."""

import array
import contextlib
import errno
import os
import socket
from collections.abc import Iterable, Sequence


def send(
    line: socket.socket, data: bytes, descriptors: Sequence[int], *, wait: bool = True
) -> None:
    """Send a message with descriptors.

    Raises:
        BlockingIOError: `wait` is false and there is no room.
        BrokenPipeError, ConnectionResetError: the other end is gone.
        OSError: anything else that sendmsg(2) says; nothing was sent.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    flags = socket.MSG_NOSIGNAL | _waiting(wait=wait)
    line.sendmsg([data], rights if descriptors else [], flags)


def receive(
    line: socket.socket, most_bytes: int, most_descriptors: int, *, wait: bool = True
) -> tuple[bytes, list[int]]:
    """Take a message, empty if the other end is gone, and its descriptors: now ours, close-on-exec.

    There is room for an even number of them; the kernel makes it.

    Raises:
        BlockingIOError: `wait` is false and there is nothing.
        ConnectionResetError: the other end is gone, with something of ours unread.
        OSError: EMSGSIZE: it is longer, or has more descriptors with it. They are closed.
    """
    room = socket.CMSG_SPACE(most_descriptors * array.array("i").itemsize)
    flags = socket.MSG_CMSG_CLOEXEC | _waiting(wait=wait)
    data, ancillary, seen, _ = line.recvmsg(most_bytes, room, flags)
    descriptors = _descriptors_in(ancillary)
    if seen & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(descriptors)
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    return data, descriptors


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors that came along and are not wanted."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _waiting(*, wait: bool) -> int:
    return 0 if wait else socket.MSG_DONTWAIT


def _descriptors_in(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            # Of a message cut short, the last number may be.
            usable = len(data) - len(data) % descriptors.itemsize
            descriptors.frombytes(data[:usable])
    return list(descriptors)
