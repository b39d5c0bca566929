"""The sockets on which the front, the broker and a job exchange messages.

Every channel is an AF_UNIX SOCK_SEQPACKET pair: a message arrives whole or not at all, and either
end sees at once when the other is gone. One joins broker and front for as long as both live; one
joins a job and the front, and *is* the job's life: whoever closes it ends the job.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol, Self

from convertd_core import codec, messages
from convertd_daemon.linux import scm_rights

MAX_MESSAGE_BYTES: Final = 160 * 1024
"""Two paths of 4 KiB, each byte escaped to six, and then some. Below the default SO_SNDBUF."""

ONE_DESCRIPTOR: Final = 1
"""Of the broker's messages to the front. No other message has descriptors."""


class Closed(Exception):
    """The other end of the channel is gone."""


class TooLong(Exception):
    """A message of more bytes than the other end takes. Nothing was sent."""


# --- the socket --------------------------------------------------------------------------------


def encoded(message: object) -> bytes:
    """Put a message into bytes that can be sent. What a queue holds must be this.

    Raises:
        TooLong: it has more bytes than the other end takes.
    """
    data = codec.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise TooLong(f"{type(message).__name__} of {len(data)} bytes")
    return data


class CantPass(Exception):
    """The kernel passes no descriptor at present. Nothing was sent."""


CANT_PASS: Final = frozenset({errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM})
"""ETOOMANYREFS: as many descriptors of root's are in flight as we may have open, also those that
root in a container sent. Source: unix(7)."""


class Channel:
    """One end of a SOCK_SEQPACKET pair, with typed messages and descriptors.

    Owns its socket. Not for two threads at once.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Make both ends of a new channel, close-on-exec, on which no descriptor is sent."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (here, there):
            scm_rights.refuse(end)
        return cls(here), cls(there)

    def fileno(self) -> int:
        """The descriptor, for a selector."""
        return self.sock.fileno()

    def close(self) -> None:
        """Close this end."""
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, message: object, *descriptors: int, wait: bool = True) -> bool:
        """Send a message, with descriptors that the other end gets its own copies of.

        With `wait` false, False says that there was no room and nothing was sent.

        Raises:
            Closed: the other end is gone.
            TooLong: nothing was sent.
        """
        return self.send_bytes(encoded(message), *descriptors, wait=wait)

    def send_bytes(self, data: bytes, *descriptors: int, wait: bool = True) -> bool:
        """Send an encoded message. See `send`."""
        try:
            scm_rights.send(self.sock, data, descriptors, wait=wait)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error
        except OSError as error:
            if not descriptors or error.errno not in CANT_PASS:
                raise
            raise CantPass from error
        return True

    def receive(
        self, *kinds: type[Any], wait: bool = True, most_descriptors: int = 0
    ) -> tuple[Any, list[int]]:
        """Receive one message of these kinds, with its descriptors, which the caller then owns.

        Raises:
            Closed: the other end is gone.
            BlockingIOError: `wait` is false and there is nothing.
            CodecError: the message is none of these. Its descriptors are closed. Where none are
                expected, one that has any is not taken: it is there still, and nothing comes after.
        """
        data, descriptors = self._receive(MAX_MESSAGE_BYTES, most_descriptors, wait=wait)
        with _closing_on_error(descriptors):
            return codec.decode(data, *kinds), descriptors

    def receive_passphrase(self, most_bytes: int) -> bytes:
        """Wait for a passphrase, and take it. It is no message: nothing logs or repeats it.

        Raises:
            Closed: the other end is gone.
            CodecError: it is none, or has more bytes.
        """
        data, _ = self._receive(len(messages.PASSPHRASE) + most_bytes, 0, wait=True)
        if not data.startswith(messages.PASSPHRASE):
            raise codec.CodecError("no passphrase")
        return data.removeprefix(messages.PASSPHRASE)

    def _receive(
        self, most_bytes: int, most_descriptors: int, *, wait: bool
    ) -> tuple[bytes, list[int]]:
        try:
            data, descriptors = scm_rights.receive(
                self.sock, most_bytes, most_descriptors, wait=wait
            )
        except ConnectionResetError as error:
            raise Closed from error
        except scm_rights.Attached as error:
            raise codec.CodecError("a message with descriptors") from error
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            raise codec.CodecError("a message that is too long") from error
        if not data:
            scm_rights.close_all(descriptors)
            raise Closed
        return data, descriptors


class Sender(Protocol):
    """Sends messages, at once or later."""

    @property
    def is_behind(self) -> bool:
        """Whether a message would not be sent at once."""

    def send(self, message: object, descriptor: int | None = None) -> None:
        """Send a message, with a descriptor, which is then no longer the caller's."""


class SendQueue:
    """What is to be sent on a channel, in order, also when the channel has no room for it now.

    Whoever has messages in it waits until the channel can be written to, and calls `flush`. Owns
    the descriptors that it was given. `sent` counts the messages that there was room for.
    """

    def __init__(self, to: Channel, on_not_passed: Callable[[object], None] | None = None) -> None:
        """Send there. `on_not_passed` is called for each message whose descriptor can't be passed.

        That message is lost, and its descriptor, a socket, is shut down.
        """
        self.sent = 0
        self._channel = to
        self._on_not_passed = on_not_passed
        self._pending: collections.deque[tuple[bytes, int | None, object]] = collections.deque()

    @property
    def has_pending(self) -> bool:
        """Whether something waits for room in the channel."""
        return bool(self._pending)

    def send(self, message: object, descriptor: int | None = None) -> None:
        """Send a message, with a descriptor that is then closed here; later, if there is no room.

        Raises:
            Closed: the other end is gone. Nothing waits any more.
            TooLong: it is not sent. It must not wait with the others: nothing would get past it.
        """
        with contextlib.ExitStack() as unsent:
            if descriptor is not None:
                unsent.callback(os.close, descriptor)
            data = encoded(message)
            unsent.pop_all()
        self._pending.append((data, descriptor, message))
        self.flush()

    def send_bytes(self, data: bytes) -> None:
        """Send an encoded message. See `send`."""
        self._pending.append((data, None, None))
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as there is room.

        Raises:
            Closed: the other end is gone. Nothing waits any more.
        """
        while self._pending:
            data, descriptor, message = self._pending[0]
            rights = () if descriptor is None else (descriptor,)
            try:
                if not self._channel.send_bytes(data, *rights, wait=False):
                    return
            except Closed:
                self.clear()
                raise
            except CantPass:
                self._pending.popleft()
                self._give_up(descriptor, message)
                continue
            self._pending.popleft()
            self.sent += 1
            if descriptor is not None:
                os.close(descriptor)

    def _give_up(self, descriptor: int | None, message: object) -> None:
        with socket.socket(fileno=descriptor) as sock, contextlib.suppress(OSError):
            # Others have copies, or the other end: this ends it for them too.
            sock.shutdown(socket.SHUT_RDWR)
        if self._on_not_passed is not None:
            self._on_not_passed(message)

    def clear(self) -> None:
        """Close the descriptors that were not sent, of which others may have copies."""
        scm_rights.close_all([fd for _, fd, _ in self._pending if fd is not None])
        self._pending.clear()


@contextlib.contextmanager
def _closing_on_error(descriptors: list[int]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        scm_rights.close_all(descriptors)
        raise
