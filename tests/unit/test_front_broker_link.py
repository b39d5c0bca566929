"""The front's channels: what broker and jobs say reaches the call it is about, in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import channels
import pytest
import refusals
from descriptors import none_left_open
from descriptors import open_descriptors as open_now

from convertd_core import conditions, messages, results, validation, values
from convertd_daemon import channel
from convertd_daemon.front import (
    broker_link,
    health_probe,
    relay,
    secret_pipes,
    unanswered,
)

DEADLINE_S = 60.0

FAILURE = conditions.InternalError(error_id="x").failure()
COMPLETE = messages.ReplyComplete()


def waiting(position: int) -> messages.Queued:
    """The broker says where a job stands in the queue."""
    return messages.Queued(job_id="job-1", position=position)


def progressed(percent: float) -> messages.Progressed:
    """A job says how far it is."""
    progress = results.Progress(phase=values.Phase.CONVERTING, percent=percent)
    return messages.Progressed(progress=progress)


def failed(reason: str) -> messages.Failed:
    """A job says that it failed."""
    return messages.Failed(failure=conditions.Failure(reason=reason, message=""))


def request_to(
    link: broker_link.BrokerLink, *secrets: int, job_id: str = ""
) -> contextlib.AbstractContextManager[broker_link.Call]:
    """Ask the broker something, over connection 5."""
    return link.call(5, messages.CancelJob(job_id=job_id), secrets)


def request_of(call: int) -> messages.Request:
    """What the broker hears of it."""
    return messages.Request(call=call, connection=5, body=messages.CancelJob(job_id=""))


class Broker:
    """The broker's end of the channel."""

    def __init__(self, end: channel.Channel) -> None:
        self.channel = end

    def receive(self) -> object:
        """The next thing that the front says."""
        message, _ = self.channel.receive(*messages.FROM_FRONT, wait=False)
        return message

    def reply(self, call: int, body: messages.ReplyBody) -> None:
        """Say something about a call."""
        self.channel.send(messages.Reply(call=call, body=body))

    def start_job(self, call: int, job_id: str = "job-1") -> channel.Channel:
        """Say that a call's job runs, and give the job's end of its channel."""
        job, fronts = channel.Channel.pair()
        started = messages.Reply(call=call, body=messages.Started(job_id=job_id))
        self.channel.send(started, fronts.fileno())
        fronts.close()
        return job


class Prober(health_probe.Prober):
    """Finds every connection healthy, without looking."""

    def __init__(self) -> None:
        """Listen nowhere."""

    def probe(self, descriptor: int, on_health: Callable[[], None]) -> None:
        """Take the connection, and say at once that all is well."""
        os.close(descriptor)
        on_health()


Test = Callable[[broker_link.BrokerLink, Broker], Awaitable[None]]


def run(test: Test) -> None:
    """Run a test with a link and a broker, in a loop in which nothing hangs or is left over."""

    async def bounded() -> None:
        ours, theirs = channels.passing()
        with ours, theirs:
            broker = broker_link.BrokerLink(
                ours, relay.Relay("/nowhere", lambda _: lambda _: ()), Prober()
            )
            await asyncio.wait_for(test(broker, Broker(theirs)), DEADLINE_S)
            asyncio.get_running_loop().remove_reader(ours.fileno())
            asyncio.get_running_loop().remove_writer(ours.fileno())

    with none_left_open():
        asyncio.run(bounded())


async def until_closed(end: channel.Channel) -> None:
    """Talk until nobody is at the other end any more."""
    while True:
        await loop_rounds()
        try:
            end.send(progressed(0.0), wait=False)
        except channel.Closed:
            return


async def loop_rounds(count: int = 3) -> None:
    """Let the loop look at its descriptors."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_broker_reply_reaches_the_call_that_asked() -> None:
    """Two calls at once, answered in the other order."""

    async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
        with request_to(a_link) as one, request_to(a_link) as two:
            assert broker.receive() == request_of(one.number)
            assert broker.receive() == request_of(two.number)
            for call in (two, one):
                broker.reply(call.number, COMPLETE)
            assert await one.next() == COMPLETE
            assert await two.next() == COMPLETE

    run(test)


def test_unanswered_requests_of_the_front_are_limited() -> None:
    """Of one user: others' requests would come after all of it. What is called off is not asked."""

    async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
        with contextlib.ExitStack() as stack:
            calls = [stack.enter_context(request_to(a_link)) for _ in range(unanswered.AT_ONCE)]
            for call in calls:
                assert broker.receive() == request_of(call.number)
            with request_to(a_link):
                pass
            later = stack.enter_context(request_to(a_link))
            with pytest.raises(BlockingIOError):
                broker.receive()
            broker.reply(calls[0].number, COMPLETE)
            await calls[0].next()
            assert broker.receive() == request_of(later.number)
            with pytest.raises(BlockingIOError):
                broker.receive()

    run(test)


def test_requests_of_one_user_do_not_block_those_of_another() -> None:
    """However much waits; and an answer to a call that is over makes room as well."""
    sent: list[bytes] = []
    one = unanswered.Unanswered(sent.append)
    for call in range(10):
        one.ask(1234, call, b"%d" % call)
    one.ask(1235, 10, b"another")
    assert sent == [b"0", b"1", b"2", b"3", b"another"]
    assert one.withdraw(1234, 4)
    assert not one.withdraw(1234, 3)
    for call in (3, 3, 99):
        one.answered(call)
    assert sent[5:] == [b"5"]


def test_last_messages_of_a_stopping_broker_are_received() -> None:
    """All of it, though what there is to send can't be sent any more."""

    async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
        with contextlib.ExitStack() as stack:
            calls = [
                stack.enter_context(request_to(a_link)) for _ in range(3 * broker_link.AT_A_TIME)
            ]
            for call in calls:
                broker.reply(call.number, COMPLETE)
            broker.channel.close()
            a_link.send(messages.Ready())
            for call in calls:
                assert await call.next() == COMPLETE
                call.over = True

    run(test)


def test_ended_call_is_reported_to_the_broker() -> None:
    """However it is left, the broker is told, unless the call had ended anyway."""

    async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
        with contextlib.suppress(LookupError), request_to(a_link) as call:
            broker.receive()
            raise LookupError
        assert broker.receive() == messages.CallAbandoned(call=call.number)
        with request_to(a_link) as call:
            broker.receive()
            call.over = True
        with pytest.raises(BlockingIOError):
            broker.receive()

    run(test)


def test_message_for_an_ended_call_is_dropped() -> None:
    """And a job that starts for it ends: its channel is closed."""

    async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
        with request_to(a_link) as call:
            pass
        broker.reply(call.number, waiting(1))
        broker.channel.send(messages.Ended(job_id="job-1", failure=FAILURE))
        job = broker.start_job(call.number)
        with job:
            await until_closed(job)
        assert a_link.call_of_job("job-1") is None

    run(test)


def test_request_that_is_too_long_is_refused_by_the_front() -> None:
    """The caller is told, and the next question gets through."""

    async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
        with pytest.raises(channel.TooLong), request_to(a_link, job_id="x" * 200_000):
            pass
        assert isinstance(broker.receive(), messages.CallAbandoned)
        with request_to(a_link) as call:
            assert broker.receive() == request_of(call.number)

    run(test)


class TestJobChannels:
    """What a job says comes by its own channel."""

    def test_job_events_reach_their_call_in_order(self) -> None:
        """After what the broker said of the queue."""

        async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
            with request_to(a_link) as call:
                broker.reply(call.number, waiting(1))
                assert await call.next() == waiting(1)
                with broker.start_job(call.number) as job:
                    job.send(progressed(1.0))
                    job.send(failed("NO_SPACE"))
                    assert await call.next() == progressed(1.0)
                    assert await call.next() == failed("NO_SPACE")
                assert call.job_id == "job-1"
                assert a_link.call_of_job("job-1") is call

        run(test)

    def test_unread_progress_is_replaced_by_newer_progress(self) -> None:
        """A slow reader costs one message; what must arrive does."""

        async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
            with request_to(a_link) as call:
                for position in (9, 8, 7):
                    broker.reply(call.number, waiting(position))
                with broker.start_job(call.number) as job:
                    for percent in (1.0, 2.0, 3.0):
                        job.send(progressed(percent))
                    job.send(failed("NO_SPACE"))
                    await loop_rounds()
                    assert await call.next() == waiting(7)
                    assert await call.next() == progressed(3.0)
                    assert await call.next() == failed("NO_SPACE")

        run(test)

    def test_job_result_is_delivered_before_the_news_of_its_end(self) -> None:
        """Whichever channel is looked at first: it did succeed, and nobody hears otherwise."""

        async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
            with request_to(a_link) as call:
                job = broker.start_job(call.number)
                await loop_rounds()
                broker.channel.send(messages.Ended(job_id="job-1", failure=FAILURE))
                with job:
                    job.send(failed("NO_SPACE"))
                assert await call.next() == failed("NO_SPACE")
                assert await call.next() == messages.Ended(job_id="job-1", failure=FAILURE)

        run(test)

    def test_job_end_without_a_result_is_reported_by_the_broker(self) -> None:
        """A channel that closes says nothing of why."""

        async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
            with request_to(a_link) as call:
                broker.start_job(call.number).close()
                await loop_rounds()
                broker.channel.send(messages.Ended(job_id="job-1", failure=FAILURE))
                assert await call.next() == messages.Ended(job_id="job-1", failure=FAILURE)

        run(test)

    def test_invalid_message_from_a_job_ends_the_job(self) -> None:
        """It was ours once."""

        async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
            with request_to(a_link) as call, broker.start_job(call.number) as job:
                job.send_bytes(b"nonsense")
                await until_closed(job)

        run(test)

    def test_job_is_sent_its_passphrases_when_it_starts(self) -> None:
        """In their order, and nothing else is, nor to the broker."""

        async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
            with secret_pipes.holding([b"one", b"x" * validation.MAX_PASSPHRASE_BYTES]) as held:
                with request_to(a_link, *held) as call, broker.start_job(call.number) as job:
                    while not call.job_id:
                        await loop_rounds()
                    assert job.receive_passphrase(validation.MAX_PASSPHRASE_BYTES) == b"one"
                    assert (
                        job.receive_passphrase(validation.MAX_PASSPHRASE_BYTES)
                        == b"x" * validation.MAX_PASSPHRASE_BYTES
                    )
                    with pytest.raises(BlockingIOError):
                        job.receive(messages.Ready, wait=False)
                assert broker.receive() == request_of(call.number)
                assert isinstance(broker.receive(), messages.CallAbandoned)

        run(test)

    def test_ended_job_is_sent_no_passphrase(self) -> None:
        """How it ended is for the broker to tell."""

        async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
            with secret_pipes.holding([b"one"]) as held, request_to(a_link, *held) as call:
                broker.start_job(call.number).close()
                await loop_rounds()
                broker.channel.send(messages.Ended(job_id="job-1", failure=FAILURE))
                assert await call.next() == messages.Ended(job_id="job-1", failure=FAILURE)

        run(test)

    def test_ended_call_ends_its_job(self) -> None:
        """Its channel is its life."""

        async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
            with request_to(a_link) as call:
                job = broker.start_job(call.number)
                while not call.job_id:
                    await loop_rounds()
            with job, pytest.raises(channel.Closed):
                job.send(progressed(0.0))

        run(test)

    def test_job_outcome_is_forwarded_to_the_broker(self) -> None:
        """So that its destination is free before its process is gone."""

        async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
            with request_to(a_link) as call:
                broker.receive()
                call.finish()
                assert broker.receive() == messages.JobFinished(call=call.number)
                call.over = True

        run(test)


def lowest_free() -> int:
    """The number that the next descriptor will have."""
    free = os.dup(0)
    os.close(free)
    return free


class TestBroker:
    """It is alone, it may be busy, and it may end."""

    def test_broker_end_fails_all_calls_after_its_last_message(self) -> None:
        """What it had said before is heard first."""

        async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
            with request_to(a_link) as one, request_to(a_link) as two:
                broker.reply(one.number, COMPLETE)
                waiter = asyncio.ensure_future(two.next())
                await loop_rounds()
                broker.channel.close()
                await a_link.ended.wait()
                assert await one.next() == COMPLETE
                for call in (one.next(), waiter):
                    with pytest.raises(broker_link.BrokerIsGone):
                        await call
            assert a_link.closed

        run(test)

    def test_broker_end_is_detected_by_the_next_request(self) -> None:
        """Before anybody looked whether there is something to read."""

        async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
            broker.channel.close()
            with request_to(a_link) as call, pytest.raises(broker_link.BrokerIsGone):
                await call.next()

        run(test)

    def test_requests_to_a_busy_broker_are_queued_in_order(self) -> None:
        """Thousands of questions, more than the channel holds."""

        async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
            count = 5000
            for number in range(count):
                a_link.send(request_of(number))
            for number in range(count):
                while True:
                    try:
                        assert broker.receive() == request_of(number)
                        break
                    except BlockingIOError:
                        await loop_rounds(1)

        run(test)

    def test_unknown_broker_message_is_dropped_and_the_next_is_read(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The next message is heard."""

        async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
            with request_to(a_link) as call:
                broker.channel.send_bytes(b"nonsense")
                broker.reply(call.number, COMPLETE)
                assert await call.next() == COMPLETE

        run(test)
        assert "a message from the broker was lost" in caplog.text

    def test_watchdog_probe_connection_is_passed_to_the_prober(self) -> None:
        """And what it finds is told, under the broker's number."""

        async def test(_: broker_link.BrokerLink, broker: Broker) -> None:
            here, there = channel.Channel.pair()
            broker.channel.send(messages.Probe(probe=4), there.fileno())
            there.close()
            with here:
                await until_closed(here)
            assert broker.receive() == messages.ProbeAnswered(probe=4)

        run(test)

    def test_accepted_connection_is_passed_to_the_relay_with_its_number(self) -> None:
        """With the broker's number."""

        async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
            here, there = channel.Channel.pair()
            broker.channel.send(messages.Connected(connection=9, uid=1234), there.fileno())
            there.close()
            with here:
                # Nobody listens upstream, so the relay ends the connection.
                await until_closed(here)
            await a_link.relay.drain(DEADLINE_S)

        run(test)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (messages.Refused(failure=FAILURE), FAILURE),
        (messages.Failed(failure=FAILURE), FAILURE),
        (messages.Ended(job_id="x", failure=FAILURE), FAILURE),
        (COMPLETE, None),
        (progressed(1.0), None),
    ],
    ids=["refused", "failed", "ended", "done", "progress"],
)
def test_call_ends_with_the_failure_of(
    message: object, expected: conditions.Failure | None
) -> None:
    """Broker or job; nothing else is one."""
    assert broker_link.is_last(message) == expected


@pytest.fixture
def descriptors() -> Iterator[Callable[[], int]]:
    """Count the descriptors that are open more than at the test's beginning."""
    before = open_now()
    with none_left_open():
        yield lambda: len(open_now() - before)


class TestPassphrases:
    """On pipes, until there is a job."""

    def test_each_passphrase_of_a_call_is_on_its_own_pipe(
        self, descriptors: Callable[[], int]
    ) -> None:
        """And nowhere else: the list is empty at once."""
        secrets = [b"one", b"x" * validation.MAX_PASSPHRASE_BYTES]
        with secret_pipes.holding(secrets) as held:
            assert secrets == []
            assert descriptors() == 2
            assert os.read(held[0], 9999) == b"one"
            assert len(os.read(held[1], 9999)) == validation.MAX_PASSPHRASE_BYTES
            assert os.read(held[0], 1) == b""

    @pytest.mark.parametrize(
        "wrong", [b"", b"x" * (validation.MAX_PASSPHRASE_BYTES + 1)], ids=["empty", "long"]
    )
    def test_invalid_passphrase_of_a_call_is_refused_and_leaves_no_pipe(
        self, descriptors: Callable[[], int], wrong: bytes
    ) -> None:
        """Not even the pipe of the one before it; and it is not repeated in the refusal."""
        refused = refusals.refusal_of(lambda: secret_pipes.holding([b"fine", wrong]).__enter__())
        assert refused is not None
        assert refused.message == "encryption.passphrase: must have 1 to 4096 bytes"
        assert descriptors() == 0

    def test_call_without_passphrases_has_no_pipe(self, descriptors: Callable[[], int]) -> None:
        """Most requests."""
        with secret_pipes.holding([]) as held:
            assert (held, descriptors()) == ((), 0)


def test_relay_with_a_link_connects_peers_to_the_server() -> None:
    """Both together: who connected talks to who listens."""
    with tempfile.TemporaryDirectory(dir="/run") as directory:
        path = str(Path(directory) / "grpc.sock")

        async def test(a_link: broker_link.BrokerLink, broker: Broker) -> None:
            a_link.relay.upstream_path = path
            greeted = asyncio.Event()

            async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                peer = f"unix-abstract:{writer.get_extra_info('peername')[1:].decode()}"
                assert a_link.relay.connection_of(peer) == 9
                writer.close()
                await writer.wait_closed()
                greeted.set()

            server = await asyncio.start_unix_server(greet, path)
            here, there = channel.Channel.pair()
            broker.channel.send(messages.Connected(connection=9, uid=1234), there.fileno())
            there.close()
            await greeted.wait()
            here.close()
            await a_link.relay.drain(DEADLINE_S)
            await loop_rounds()
            assert broker.receive() == messages.Released(connection=9)
            server.close()
            await server.wait_closed()

        run(test)
