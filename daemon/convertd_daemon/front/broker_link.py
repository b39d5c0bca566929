"""The front's side of its channel to the broker, and of each job's channel.

A `Call` collects what broker and job say of one gRPC call. Progress that nobody has read yet is
replaced by newer progress, so a peer that reads slowly costs one message, not memory.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import logging
import socket
from typing import TYPE_CHECKING, Final

from convertd_core import codec, conditions, messages
from convertd_daemon import channel
from convertd_daemon.front import secret_pipes, unanswered
from convertd_daemon.linux import scm_rights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from convertd_daemon.front.health_probe import Prober
    from convertd_daemon.front.relay import Relay

log = logging.getLogger(__name__)

AT_A_TIME: Final = 16
"""So many messages are taken from the broker before calls get their turn: some make much work."""

REPLACED_BY_NEWER: Final = (messages.Progressed, messages.Queued)


class BrokerIsGone(Exception):
    """The broker's end of the channel closed: nothing more will be heard."""


class Call:
    """What is said about one call, in order. Used by one coroutine at a time."""

    def __init__(self, link: BrokerLink, number: int, secrets: tuple[int, ...]) -> None:
        """Belongs to a link, which hands it what it hears. Borrows the pipes with passphrases."""
        self.number = number
        self._secrets = secrets
        self.job_id = ""
        self.over = False
        self._link = link
        self._heard: collections.deque[object] = collections.deque()
        self._news = asyncio.Event()
        self._channel: channel.Channel | None = None

    def deliver(self, message: object) -> None:
        """Take in a message from the broker or the job."""
        replaces = isinstance(message, REPLACED_BY_NEWER)
        if replaces and self._heard and type(self._heard[-1]) is type(message):
            self._heard.pop()
        self._heard.append(message)
        self._news.set()

    def deliver_end(self, message: messages.Ended) -> None:
        """Take in that the job's process is gone, after whatever the job itself still said.

        Both come at once, on two channels, and epoll(7) tells in any order.
        """
        self._listen()
        self.deliver(message)

    async def next(self) -> object:
        """Wait for the next message.

        Raises:
            BrokerIsGone: there will be none.
        """
        while not self._heard:
            if self._link.closed:
                raise BrokerIsGone
            self._news.clear()
            await self._news.wait()
        return self._heard.popleft()

    def wake(self) -> None:
        """Let whoever waits see that the link is closed."""
        self._news.set()

    def attach_job(self, job_id: str, descriptor: int) -> None:
        """Listen to a job's channel from now on, which is ours, and send its passphrases."""
        self.job_id = job_id
        self._channel = channel.Channel(socket.socket(fileno=descriptor))
        # A job that is gone already is heard of as any other.
        with contextlib.suppress(channel.Closed):
            secret_pipes.hand_on(self._secrets, self._channel)
        asyncio.get_running_loop().add_reader(descriptor, self._listen)

    def _listen(self) -> None:
        if self._channel is None:
            return
        try:
            while True:
                message, _ = self._channel.receive(*messages.FROM_JOB, wait=False)
                self.deliver(message)
        except BlockingIOError:
            return
        except channel.Closed:
            # How it ended, if it did not say so itself, is for the broker to tell.
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
        except codec.CodecError:
            log.exception("a job sent what is no message job=%s", self.job_id)
            self.close_job_channel()

    def finish(self) -> None:
        """Its job said how it ended: the broker need not wait for the process to know."""
        self._link.send(messages.JobFinished(call=self.number))

    def close_job_channel(self) -> None:
        """Close the job's channel: if the job still runs, that ends it."""
        if self._channel is not None:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._channel.close()
            self._channel = None


class BrokerLink:
    """The channel to the broker. Owns it."""

    def __init__(self, line: channel.Channel, relay: Relay, prober: Prober | None = None) -> None:
        """Hand new connections to the relay, and those to probe to the prober, if there is one."""
        self.channel = line
        self.relay = relay
        self.prober = prober
        self.closed = False
        self.ended = asyncio.Event()
        self._calls: dict[int, Call] = {}
        self._numbers = itertools.count(1)
        self._outbound = channel.SendQueue(line)
        self._users: dict[int, int] = {}
        self._unanswered = unanswered.Unanswered(self._send)
        asyncio.get_running_loop().add_reader(line.fileno(), self._listen)

    def call_of_job(self, job_id: str) -> Call | None:
        """The call that a job belongs to."""
        return next((call for call in self._calls.values() if call.job_id == job_id), None)

    @contextlib.contextmanager
    def call(self, make: Callable[[int], object], secrets: tuple[int, ...] = ()) -> Iterator[Call]:
        """Ask the broker something; when the block is left, by whichever way, the call is over.

        `secrets` are pipes with passphrases for its job; they are the caller's to close, after the
        block.

        If nobody said that it ended, the broker is told that nobody wants it any more.

        Raises:
            channel.TooLong: the question is longer than any that can be answered.
        """
        call = Call(self, next(self._numbers), secrets)
        request = make(call.number)
        uid = self._users.get(getattr(request, "connection", 0))
        self._calls[call.number] = call
        try:
            self._unanswered.ask(uid, call.number, channel.encoded(request))
            yield call
        finally:
            del self._calls[call.number]
            call.close_job_channel()
            if not self._unanswered.withdraw(uid, call.number) and not call.over:
                self.send(messages.CallAbandoned(call=call.number))

    def send(self, message: object) -> None:
        """Send to the broker, later if there is no room now.

        Raises:
            channel.TooLong: it is not sent. It must not get in line: nothing would get past it.
        """
        self._send(channel.encoded(message))

    def _send(self, data: bytes) -> None:
        # What a broker that is gone still said is there to be read; its end comes after that.
        with contextlib.suppress(channel.Closed):
            self._outbound.send_bytes(data)
        self._await_room()

    def _flush(self) -> None:
        with contextlib.suppress(channel.Closed):
            self._outbound.flush()
        self._await_room()

    def _await_room(self) -> None:
        loop = asyncio.get_running_loop()
        if self._outbound.has_pending:
            loop.add_writer(self.channel.fileno(), self._flush)
        else:
            loop.remove_writer(self.channel.fileno())

    def _listen(self) -> None:
        try:
            for _ in range(AT_A_TIME):
                message, descriptors = self.channel.receive(
                    *messages.FROM_BROKER, wait=False, most_descriptors=channel.ONE_DESCRIPTOR
                )
                self._dispatch(message, descriptors)
        except BlockingIOError:
            return
        except channel.Closed:
            self._close()
        except codec.CodecError:
            # Of our own broker's: it sent what we don't know, or we ran out of descriptors.
            log.exception("a message from the broker was lost")

    def _dispatch(self, message: messages.ToFront, descriptors: list[int]) -> None:
        match message:
            case messages.Connected(connection=number, uid=uid):
                self._users[number] = uid
                self.relay.carry(number, descriptors.pop(), uid, lambda: self._release(number))
            case messages.Probe(probe=number):
                healthy = messages.ProbeAnswered(probe=number)
                if self.prober is not None:
                    self.prober.probe(descriptors.pop(), lambda: self.send(healthy))
            case messages.Ended(job_id=job_id):
                call = self.call_of_job(job_id)
                if call is not None:
                    call.deliver_end(message)
            case _:
                self._unanswered.answered(message.call)
                call = self._calls.get(message.call)
                if call is None:
                    log.debug("for a call that is over: %s", message)
                elif isinstance(message, messages.Started):
                    call.attach_job(message.job_id, descriptors.pop())
                else:
                    call.deliver(message)
        # A job whose caller is gone ends with this.
        scm_rights.close_all(descriptors)

    def _release(self, number: int) -> None:
        del self._users[number]
        self.send(messages.Released(connection=number))

    def _close(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.channel.fileno())
        loop.remove_writer(self.channel.fileno())
        self.closed = True
        self._outbound.clear()
        for call in self._calls.values():
            call.wake()
        self.ended.set()


def is_last(message: object) -> conditions.Failure | None:
    """The failure with which a message ends a call; None if it does not."""
    match message:
        case messages.Refused(failure=failure) | messages.Failed(failure=failure):
            return failure
        case messages.Ended(failure=failure):
            return failure
    return None
