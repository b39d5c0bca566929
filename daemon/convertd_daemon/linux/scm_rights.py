"""unix(7), SCM_RIGHTS: send and receive messages with descriptors."""

import array
import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterable, Sequence
from typing import Final

_SO_PASSRIGHTS: Final = 83
"""asm-generic/socket.h, since Linux 6.16; Python has no name for it."""

_SIOCINQ: Final = 0x541B
"""The number of unread bytes. Source: unix(7)."""

_MAX_PEEKED_BYTES: Final = 1024 * 1024
"""More than a peer can leave unread with Linux's default net.core.wmem_max."""


class Attached(Exception):
    """Descriptors are attached to the next bytes. Neither was received."""


def refuse(sock: socket.socket) -> bool:
    """Have the kernel refuse descriptors that are sent to this socket from now on.

    Senders get EPERM. Sockets accepted from a listening one inherit it. Returns False before Linux
    6.16, which lacks the option: then, and for bytes sent before, only `peeked`, `receive` and
    `holds_none` keep this process from receiving descriptors.

    Raises:
        OSError: the kernel has the option, but setting it failed.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return False
    return True


def inline_oob(sock: socket.socket) -> None:
    """Have a byte that the peer sends out of band read in line.

    Else recv(2) skips it and drops descriptors attached to it, and MSG_PEEK does not show it
    (measured on 6.18, 2026-11).

    Raises:
        OSError: as setsockopt(2).
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def read(sock: socket.socket, most_bytes: int) -> bytes:
    """Read from a stream without waiting, and receive no descriptor; empty at its end.

    There must be no other reader. Needs `inline_oob`.

    Raises:
        Attached: descriptors are attached to some of the bytes.
        BlockingIOError: there is nothing to read.
        OSError: as recv(2).
    """
    count = len(peeked(sock, most_bytes, wait=False))
    # Exactly those: bytes that arrived since may have descriptors attached.
    return sock.recv(count, socket.MSG_DONTWAIT) if count else b""


def peeked(sock: socket.socket, most_bytes: int, *, wait: bool) -> bytes:
    """Return the next bytes without taking them from the socket.

    Raises:
        Attached: descriptors are attached. The kernel sets MSG_CTRUNC, as there is no room.
        BlockingIOError: `wait` is false and there is nothing to read.
        OSError: as recvmsg(2).
    """
    data, _, seen, _ = sock.recvmsg(most_bytes, 0, socket.MSG_PEEK | _waiting(wait=wait))
    if seen & socket.MSG_CTRUNC:
        raise Attached
    return data


def holds_none(sock: socket.socket) -> bool:
    """Whether no unread bytes of a stream have descriptors attached; False if that is unknown.

    For a socket that was shut down and so receives no more: True stays true.
    """
    unread = _unread(sock)
    while 0 < unread <= _MAX_PEEKED_BYTES:
        try:
            seen = len(peeked(sock, unread, wait=False))
        except (Attached, BlockingIOError):
            return False
        still, before = _unread(sock), unread
        if still == before:
            # MSG_PEEK stops before a byte that was sent out of band.
            return seen == before
        unread = still  # another process with a copy of the socket reads
    return not unread


def _unread(sock: socket.socket) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(sock, _SIOCINQ, count)
    return count[0]


def send(
    sock: socket.socket, data: bytes, descriptors: Sequence[int], *, wait: bool = True
) -> None:
    """Send a message with descriptors.

    Raises:
        BlockingIOError: `wait` is false and there is no room.
        BrokenPipeError, ConnectionResetError: the other end is gone.
        OSError: as sendmsg(2); nothing was sent.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    flags = socket.MSG_NOSIGNAL | _waiting(wait=wait)
    sock.sendmsg([data], rights if descriptors else [], flags)


def receive(
    sock: socket.socket, most_bytes: int, most_descriptors: int, *, wait: bool = True
) -> tuple[bytes, list[int]]:
    """Receive a message, empty if the other end is gone, and its descriptors, close-on-exec.

    The caller owns the descriptors. The kernel rounds their number up to an even one. With
    `most_descriptors` 0 none is ever received.

    Raises:
        Attached: none are expected, but some are attached. The message stays unread.
        BlockingIOError: `wait` is false and there is nothing to receive.
        ConnectionResetError: the other end is gone, and has left a message of ours unread.
        OSError: EMSGSIZE, the message or its descriptors exceed the limits. They are closed.
    """
    if not most_descriptors:
        peeked(sock, 1, wait=wait)
    room = most_descriptors and socket.CMSG_SPACE(most_descriptors * array.array("i").itemsize)
    flags = socket.MSG_CMSG_CLOEXEC | _waiting(wait=wait)
    data, ancillary, seen, _ = sock.recvmsg(most_bytes, room, flags)
    descriptors = _descriptors_in(ancillary)
    if seen & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(descriptors)
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    return data, descriptors


def close_all(descriptors: Iterable[int]) -> None:
    """Close received descriptors that are not needed."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _waiting(*, wait: bool) -> int:
    return 0 if wait else socket.MSG_DONTWAIT


def _descriptors_in(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            # In a truncated message the last number may be incomplete.
            usable = len(data) - len(data) % descriptors.itemsize
            descriptors.frombytes(data[:usable])
    return list(descriptors)
