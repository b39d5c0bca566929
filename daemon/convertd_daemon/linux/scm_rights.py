"""unix(7), SCM_RIGHTS: a message, and descriptors that the other end gets its own copies of."""

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
"""Bytes that wait to be read. Source: unix(7)."""

_MOST_LOOKED_THROUGH: Final = 1024 * 1024
"""More than a peer can leave unread with Linux's own net.core.wmem_max."""


class Attached(Exception):
    """Descriptors are attached to what comes next. It was not read, and they are not ours."""


def refuse(sock: socket.socket) -> bool:
    """Have the kernel refuse descriptors that others attach from now on to what they send here.

    They get EPERM. Sockets that connect to a listening one inherit it. Before Linux 6.16 there is
    no such option, and False says so: then, and for what was sent before, nothing but `peeked`,
    `receive` and `holds_none` keeps this process from owning them.

    Raises:
        OSError: the kernel has the option, and does not set it.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return False
    return True


def inline_oob(sock: socket.socket) -> None:
    """Have a byte that the peer sends out of band be read like others.

    Else a read passes it over and drops what is attached to it, and a look does not show it
    (measured on 6.18, 2026-11).

    Raises:
        OSError: as setsockopt(2).
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def read(sock: socket.socket, most_bytes: int) -> bytes:
    """Read from a stream without waiting, never owning a descriptor; empty at its end.

    Nobody else may read from it. Needs `inline_oob`.

    Raises:
        Attached: descriptors come along, with all or with a part of it.
        BlockingIOError: there is nothing.
        OSError: as recv(2).
    """
    count = len(peeked(sock, most_bytes, wait=False))
    # Exactly that: what has come since may have descriptors with it.
    return sock.recv(count, socket.MSG_DONTWAIT) if count else b""


def peeked(sock: socket.socket, most_bytes: int, *, wait: bool) -> bytes:
    """Look at what comes next, and leave it there.

    Raises:
        Attached: descriptors come along. The kernel says MSG_CTRUNC, as there is no room for them.
        BlockingIOError: `wait` is false and there is nothing.
        OSError: as recvmsg(2).
    """
    data, _, seen, _ = sock.recvmsg(most_bytes, 0, socket.MSG_PEEK | _waiting(wait=wait))
    if seen & socket.MSG_CTRUNC:
        raise Attached
    return data


def holds_none(sock: socket.socket) -> bool:
    """Whether nothing unread in a stream has descriptors with it. Whatever can't be seen has.

    For a socket that was shut down, to which nothing comes any more: then the answer stays true.
    """
    waiting = _unread(sock)
    while 0 < waiting <= _MOST_LOOKED_THROUGH:
        try:
            seen = len(peeked(sock, waiting, wait=False))
        except (Attached, BlockingIOError):
            return False
        still, before = _unread(sock), waiting
        if still == before:
            # A look ends before a byte that was sent out of band.
            return seen == before
        waiting = still  # somebody who has a copy of it reads
    return not waiting


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
        OSError: anything else that sendmsg(2) says; nothing was sent.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    flags = socket.MSG_NOSIGNAL | _waiting(wait=wait)
    sock.sendmsg([data], rights if descriptors else [], flags)


def receive(
    sock: socket.socket, most_bytes: int, most_descriptors: int, *, wait: bool = True
) -> tuple[bytes, list[int]]:
    """Take a message, empty if the other end is gone, and its descriptors: now ours, close-on-exec.

    There is room for an even number of them; the kernel makes it. Where none are expected, none
    are ever ours.

    Raises:
        Attached: none are expected, and there are. The message is not taken.
        BlockingIOError: `wait` is false and there is nothing.
        ConnectionResetError: the other end is gone, with something of ours unread.
        OSError: EMSGSIZE: it is longer, or has more descriptors with it. They are closed.
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
