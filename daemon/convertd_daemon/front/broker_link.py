"""The front's side of its channel to the broker, and of each job's channel.

A `Call` queues the messages that broker and job send for one gRPC call. Newer progress replaces
unread progress, so a slow peer costs one message, not memory.
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
    from collections.abc import Iterator

    from convertd_daemon.front.health_probe import Prober
    from convertd_daemon.front.relay import Relay

log = logging.getLogger(__name__)

AT_A_TIME: Final = 16
"""Messages read from the broker before other tasks of the loop run: some make much work."""

REPLACED_BY_NEWER: Final = (messages.Progressed, messages.Queued)


class BrokerIsGone(Exception):
    """The broker closed its end of the channel: no more messages will come."""


class Call:
    """The messages of one call, in order. One coroutine at a time may use it."""

    def __init__(self, link: BrokerLink, number: int, secrets: tuple[int, ...]) -> None:
        """The link delivers the messages. `secrets` are borrowed pipes with passphrases."""
        self.number = number
        self._secrets = secrets
        self.job_id = ""
        self.over = False
        self._link = link
        self._messages: collections.deque[object] = collections.deque()
        self._news = asyncio.Event()
        self._channel: channel.Channel | None = None

    def deliver(self, message: object) -> None:
        """Queue a message from the broker or the job."""
        replaces = isinstance(message, REPLACED_BY_NEWER)
        if replaces and self._messages and type(self._messages[-1]) is type(message):
            self._messages.pop()
        self._messages.append(message)
        self._news.set()

    def deliver_end(self, message: messages.Ended) -> None:
        """Queue the exit of the job's process, after all messages of the job itself.

        They arrive on two channels, and epoll(7) reports these in any order.
        """
        self._listen()
        self.deliver(message)

    async def next(self) -> object:
        """Wait for the next message.

        Raises:
            BrokerIsGone: there will be none.
        """
        while not self._messages:
            if self._link.closed:
                raise BrokerIsGone
            self._news.clear()
            await self._news.wait()
        return self._messages.popleft()

    def wake(self) -> None:
        """Wake the coroutine in `next`, so that it sees that the link is closed."""
        self._news.set()

    def attach_job(self, job_id: str, descriptor: int) -> None:
        """Own a job's channel, read from it from now on, and send the job its passphrases."""
        self.job_id = job_id
        self._channel = channel.Channel(socket.socket(fileno=descriptor))
        # If the job is gone already, the broker reports that as for any other job.
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
            # If the job did not report how it ended, the broker will.
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
        except codec.CodecError:
            log.exception("a job sent an invalid message job=%s", self.job_id)
            self.close_job_channel()

    def finish(self) -> None:
        """Tell the broker that the job reported its end, before its process has exited."""
        self._link.send(messages.JobFinished(call=self.number))

    def close_job_channel(self) -> None:
        """Close the job's channel. This ends a job that still runs."""
        if self._channel is not None:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._channel.close()
            self._channel = None


class BrokerLink:
    """The channel to the broker. Owns it."""

    def __init__(self, line: channel.Channel, relay: Relay, prober: Prober | None = None) -> None:
        """Pass new connections to the relay, and health probes to the prober, if there is one."""
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
        """The call that started a job."""
        return next((call for call in self._calls.values() if call.job_id == job_id), None)

    @contextlib.contextmanager
    def call(
        self, connection: int, body: messages.RequestBody, secrets: tuple[int, ...] = ()
    ) -> Iterator[Call]:
        """Send the broker a request; the call ends when the block is left.

        `secrets` are pipes with passphrases for its job; the caller closes them after the block.
        The broker is told that the call was abandoned unless `over` was set.

        Raises:
            channel.TooLong: the request does not fit in a message.
        """
        call = Call(self, next(self._numbers), secrets)
        request = messages.Request(call=call.number, connection=connection, body=body)
        uid = self._users.get(connection)
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
            channel.TooLong: it is not sent, and not queued: it would block the queue for ever.
        """
        self._send(channel.encoded(message))

    def _send(self, data: bytes) -> None:
        # The broker's last messages are still to be read; the end of the channel follows them.
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
            # From our own broker: a message of another version, or we ran out of descriptors.
            log.exception("a message from the broker was lost")

    def _dispatch(self, message: messages.FromBroker, descriptors: list[int]) -> None:
        match message:
            case messages.Connected(connection=number, uid=uid):
                self._users[number] = uid
                self.relay.relay(number, descriptors.pop(), uid, lambda: self._release(number))
            case messages.Probe(probe=number):
                healthy = messages.ProbeAnswered(probe=number)
                if self.prober is not None:
                    self.prober.probe(descriptors.pop(), lambda: self.send(healthy))
            case messages.Ended(job_id=job_id):
                call = self.call_of_job(job_id)
                if call is not None:
                    call.deliver_end(message)
            case messages.Reply(call=number, body=body):
                self._unanswered.answered(number)
                call = self._calls.get(number)
                if call is None:
                    log.debug("message for a call that is over: %s", body)
                elif isinstance(body, messages.Started):
                    call.attach_job(body.job_id, descriptors.pop())
                else:
                    call.deliver(body)
        # This ends a job whose caller is gone.
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
    """The failure with which a message ends a call; None if it does not end the call."""
    match message:
        case messages.Refused(failure=failure) | messages.Failed(failure=failure):
            return failure
        case messages.Ended(failure=failure):
            return failure
    return None
