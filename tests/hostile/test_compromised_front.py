"""What a compromised front can't do. The broker is real, its front is the test."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import random
import signal
import socket
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, get_args

import pytest
from harness import processes, waiting
from harness.callers import ALICE, BOB, MALLORY, Caller
from harness.daemon import JOB, QEMU_IMG, Daemon
from harness.fixtures import FillPolicy, MakeDaemon
from hostile import compromised_front, simple_calls
from hostile.compromised_front import CompromisedFront
from hostile.secret import Secret
from policies import IMAGES, Grant, Policy, Root

from convertd_core import codec, messages, results, values
from convertd_daemon import channel
from convertd_daemon.linux import scm_rights

OTHERS: Final = Root("others", "{scratch}/others")
POLICY: Final = Policy(
    limits={"jobs": 3, "jobs_per_user": 2, "queue": 6, "queue_per_user": 4},
    grants=[
        Grant(read=[IMAGES], write=[IMAGES]),
        Grant(users=[1235], read=[OTHERS], write=[OTHERS]),
        Grant(users=[1236], read=[IMAGES], write=[IMAGES], formats=["raw", "luks"]),
    ],
)

DORA: Final = Caller(uid=1236, gid=1236)
"""Who may encrypt."""

MESSAGES: Final = int(os.environ.get("CONVERTD_TEST_FRONT_MESSAGES", "500"))
"""How many random messages the broker is sent."""

MUTATED: Final = int(os.environ.get("CONVERTD_TEST_FRONT_MUTATED", "15"))
"""How many corrupted ones, of which most cost a front."""

SEED: Final = int(os.environ.get("CONVERTD_TEST_SEED", "1"))


@pytest.fixture(scope="module")
def broker(fill_in: FillPolicy) -> Iterator[Daemon]:
    """The module's daemon, which is not started yet."""
    one = Daemon(fill_in(POLICY))
    yield one
    one.discard()


@pytest.fixture(scope="module")
def front_of_all(broker: Daemon) -> Iterator[CompromisedFront]:
    """Its front, once it is started."""
    home = broker.home / "front"
    home.mkdir()
    with compromised_front.started(broker, home) as one:
        yield one


@pytest.fixture
def front(broker: Daemon, front_of_all: CompromisedFront) -> Iterator[CompromisedFront]:
    """The front. After each test the broker still runs, and no job does."""
    yield front_of_all
    assert broker.is_running
    broker.await_idle()
    assert front_of_all.quiet()


@pytest.fixture
def image(images_dir: Path) -> Path:
    """An image of Alice's, large enough to take a while at the least rate."""
    os.chown(images_dir, ALICE.uid, ALICE.gid)
    return simple_calls.file_of(ALICE, images_dir / "image.raw", os.urandom(16 * values.MIB))


def conversion(source: Path, dest: Path) -> values.ConvertRequest:
    """A request that goes as slowly as can be."""
    return values.ConvertRequest(
        source=values.Source(path=str(source), format="raw"),
        dest=values.Destination(path=str(dest), format="raw"),
        rate_limit_bytes_per_second=values.MIB,
        reflink=values.Reflink.NEVER,
    )


def connection_of(front: CompromisedFront) -> int:
    """The number of whoever connected last."""
    message, descriptors = front.await_message(messages.Connected)
    scm_rights.close_all(descriptors)
    return message.connection


def await_descriptors(broker: Daemon, front: CompromisedFront, most: int) -> None:
    """Wait until the broker has no more: the next job may be about to be preforked.

    The front reads meanwhile: people who came and went may still be in the backlog.
    """
    waiting.until(
        lambda: front.quiet() and compromised_front.descriptors_of(broker.pid) <= most,
        "the broker's descriptors close",
    )


def reason(answer: object) -> str:
    """Why a call was refused."""
    assert isinstance(answer, messages.Refused), answer
    return answer.failure.reason


# --- who it can act for --------------------------------------------------------------------------


REQUESTS: Final[dict[type, Callable[[Path], messages.RequestBody]]] = {
    values.ConvertRequest: lambda path: conversion(path, path.with_suffix(".out")),
    values.InspectRequest: lambda path: values.InspectRequest(source=values.Source(path=str(path))),
    messages.ListJobs: lambda _: messages.ListJobs(),
    messages.CancelJob: lambda _: messages.CancelJob(job_id="1"),
    messages.GetAccess: lambda _: messages.GetAccess(),
    messages.GetStats: lambda _: messages.GetStats(),
}
"""One of each kind, about the image at a path."""


@pytest.mark.parametrize("kind", get_args(messages.RequestBody), ids=lambda kind: kind.__name__)
def test_compromised_front_can_not_act_for_a_caller_who_is_not_connected(
    broker: Daemon,
    front: CompromisedFront,
    image: Path,
    kind: type,
) -> None:
    """Not over a connection that never was, and not over one that has ended."""
    with compromised_front.connected(broker, ALICE):
        ended = connection_of(front)
    waiting.until(
        lambda: reason_of_access(front, ended) == "UNKNOWN_CONNECTION", "the connection ended"
    )
    body = REQUESTS[kind](image)
    for number in (ended, ended + 1, 0, -1, 2**64, 10**300):
        request = messages.Request(call=front.call(), connection=number, body=body)
        assert reason(front.ask(request)) == "UNKNOWN_CONNECTION"
    assert not image.with_suffix(".out").exists()


def reason_of_access(front: CompromisedFront, number: int) -> str:
    """Why GetAccess is refused over a connection, if it is."""
    answer = front.ask(
        messages.Request(call=front.call(), connection=number, body=messages.GetAccess())
    )
    return answer.failure.reason if isinstance(answer, messages.Refused) else ""


def test_compromised_front_can_not_use_the_health_probe_connection_of_root(
    make_daemon: MakeDaemon, image: Path
) -> None:
    """The broker makes the connection for it, and is root, who may see and end every job."""
    daemon = make_daemon(dataclasses.replace(POLICY, operators=[0]))
    home = daemon.home / "front"
    home.mkdir()
    with compromised_front.started(daemon, home, "WATCHDOG_USEC=600000") as front:
        probe, sockets = front.await_message(messages.Probe)
        number = connection_of(front)
        assert reason_of_access(front, number) == "UNKNOWN_CONNECTION"
        request = conversion(image, image.with_suffix(".out"))
        message = messages.Request(call=front.call(), connection=number, body=request)
        assert reason(front.ask(message)) == "UNKNOWN_CONNECTION"
        front.channel.send(messages.ProbeAnswered(probe=probe.probe))
        scm_rights.close_all(sockets)


def test_compromised_front_is_limited_to_the_grants_of_connected_callers(
    broker: Daemon, front: CompromisedFront, image: Path, secret: Secret
) -> None:
    """Bob is granted another root, Mallory nothing, and nobody what lies outside of all roots."""
    with compromised_front.connected(broker, BOB), compromised_front.connected(broker, MALLORY):
        bob, mallory = connection_of(front), connection_of(front)
        out = image.with_suffix(".out")
        tries = [
            (number, source, dest)
            for number in (bob, mallory)
            for source, dest in ((image, out), (secret.raw, out), (image, secret.raw))
        ]
        for number, source, dest in tries:
            message = messages.Request(
                call=front.call(), connection=number, body=conversion(source, dest)
            )
            assert reason(front.ask(message)) == "PERMISSION_DENIED"
            request = values.InspectRequest(source=values.Source(path=str(source)))
            look = messages.Request(call=front.call(), connection=number, body=request)
            assert reason(front.ask(look)) == "PERMISSION_DENIED"
    assert not out.exists()


def test_compromised_front_can_not_keep_the_job_of_a_disconnected_caller(
    broker: Daemon, front: CompromisedFront, image: Path
) -> None:
    """Though it holds the job's channel, and says nothing of the kind."""
    with compromised_front.connected(broker, ALICE):
        number, call = connection_of(front), front.call()
        request = conversion(image, image.with_suffix(".out"))
        front.channel.send(messages.Request(call=call, connection=number, body=request))
        _, job = front.await_message(messages.Started, call)
        broker.await_one(QEMU_IMG)
    ended, _ = front.await_message(messages.Ended)
    assert ended.failure.reason == "CANCELLED_BY_CALLER"
    broker.await_none(QEMU_IMG)
    scm_rights.close_all(job)
    assert os.listdir(image.parent) == ["image.raw"]


def test_compromised_front_can_not_list_or_cancel_jobs_of_another_caller(
    broker: Daemon, front: CompromisedFront, image: Path
) -> None:
    """By Bob's connection neither; that it can end Alice's by Alice's is what it is for."""
    with compromised_front.connected(broker, ALICE), compromised_front.connected(broker, BOB):
        alice, bob, call = connection_of(front), connection_of(front), front.call()
        request = conversion(image, image.with_suffix(".out"))
        front.channel.send(messages.Request(call=call, connection=alice, body=request))
        started, job = front.await_message(messages.Started, call)
        listed = front.ask(
            messages.Request(call=front.call(), connection=bob, body=messages.ListJobs())
        )
        assert isinstance(listed, messages.ReplyComplete)
        cancel = messages.Request(
            call=front.call(), connection=bob, body=messages.CancelJob(job_id=started.job_id)
        )
        assert reason(front.ask(cancel)) == "JOB_NOT_FOUND"
        waiting.until(lambda: broker.processes(JOB), "the job works")
        scm_rights.close_all(job)


# --- how much it can have ------------------------------------------------------------------------


def test_compromised_front_can_not_exceed_the_job_limits_of_the_policy(
    broker: Daemon, front: CompromisedFront, image: Path
) -> None:
    """Two run for Alice, four wait, the others are refused; and to lie that one ended is no use."""
    with compromised_front.connected(broker, ALICE):
        number = connection_of(front)
        calls = [front.call() for _ in range(20)]
        for call in calls:
            request = conversion(image, image.with_name(f"out-{call}"))
            front.channel.send(messages.Request(call=call, connection=number, body=request))
        refused: set[int] = set()
        jobs: list[int] = []
        while len(refused) < len(calls) - 6 or len(jobs) < 2:
            message, descriptors = front.receive()
            jobs += descriptors
            match message:
                case messages.Reply(call=call, body=messages.Refused(failure=failure)):
                    assert failure.reason == "QUEUE_FULL"
                    refused.add(call)
        for call in calls:
            front.channel.send(messages.JobFinished(call=call))
        assert front.quiet()
        waiting.until(lambda: len(jobs_of_broker(broker)) == 2, "two jobs work")
        scm_rights.close_all(jobs)


def jobs_of_broker(broker: Daemon) -> list[processes.Process]:
    """The jobs that a broker has, without what they have forked in turn."""
    return [one for one in broker.processes(JOB) if one.parent == broker.pid]


def test_compromised_front_can_not_reuse_the_number_of_a_running_call(
    broker: Daemon, front: CompromisedFront, image: Path
) -> None:
    """A number that is in use is refused: or its job would be out of reach."""
    with compromised_front.connected(broker, ALICE):
        number, call = connection_of(front), front.call()
        request = conversion(image, image.with_suffix(".out"))
        message = messages.Request(call=call, connection=number, body=request)
        front.channel.send(message)
        _, job = front.await_message(messages.Started, call)
        assert reason(front.ask(message)) == "BAD_MESSAGE"
        scm_rights.close_all(job)


# --- what it can ask for -------------------------------------------------------------------------

OPTIONS: Final = (
    ("backing_file", "/etc/shadow"),
    ("data_file", "/etc/shadow"),
    ("cluster_size", "65536,backing_file=/etc/shadow"),
    ("cluster_size", "65536\n"),
    ("compat", "1.1,data_file=/etc/shadow"),
    ("encrypt.key-secret", "source"),
    ("", ""),
)


@pytest.mark.parametrize(("name", "value"), OPTIONS, ids=[f"{n}={v!r}" for n, v in OPTIONS])
def test_compromised_front_can_not_pass_qemu_img_an_option_with_a_file_name(
    broker: Daemon, front: CompromisedFront, image: Path, name: str, value: str
) -> None:
    """What a caller can't say by gRPC, it can: the broker looks itself."""
    dest = values.Destination(
        path=str(image.with_suffix(".out")),
        format="qcow2",
        options=(values.CreationOption(name=name, value=value),),
    )
    with compromised_front.connected(broker, ALICE):
        request = dataclasses.replace(conversion(image, image), dest=dest)
        number = connection_of(front)
        message = messages.Request(call=front.call(), connection=number, body=request)
        assert reason(front.ask(message)) == "BAD_OPTION"


MAD: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "climbing": ({"source": values.Source(path="/etc/../etc/shadow")}, "BAD_PATH"),
    "json:": ({"source": values.Source(path="json:{}")}, "BAD_PATH"),
    "a NUL": ({"source": values.Source(path="/a\0b")}, "BAD_PATH"),
    "a long path": ({"source": values.Source(path="/" + "a" * 100_000)}, "BAD_PATH"),
    "a protocol": ({"source": values.Source(path="/a", format="nbd")}, "BAD_FORMAT"),
    "a passphrase for raw": (
        {"source": values.Source(path="/a", format="raw", encryption=values.SourceEncryption())},
        "BAD_OPTION",
    ),
    "a negative rate": ({"rate_limit_bytes_per_second": -1}, "BAD_OPTION"),
    "a rate without end": ({"rate_limit_bytes_per_second": 10**4000}, "BAD_OPTION"),
    "a label that clears": ({"label": "\x1b[2J"}, "BAD_OPTION"),
    "a label that is long": ({"label": "a" * 300}, "BAD_OPTION"),
    "setuid": ({"dest": values.Destination(path="/a", format="raw", mode=0o4755)}, "BAD_OPTION"),
    "a negative mode": (
        {"dest": values.Destination(path="/a", format="raw", mode=-1)},
        "BAD_OPTION",
    ),
    "a group and more": (
        {"dest": values.Destination(path="/a", format="raw", group="root\n")},
        "BAD_OPTION",
    ),
    "a place outside": ({"dest": values.Destination(path="/a", format="raw")}, "PERMISSION_DENIED"),
}


@pytest.mark.parametrize(("changes", "expected"), MAD.values(), ids=tuple(MAD))
def test_compromised_front_can_not_send_values_that_grpc_callers_can_not(
    broker: Daemon, front: CompromisedFront, image: Path, changes: dict[str, Any], expected: str
) -> None:
    """Values of the right type that no honest front would send."""
    with compromised_front.connected(broker, ALICE):
        request = dataclasses.replace(conversion(image, image.with_suffix(".out")), **changes)
        number = connection_of(front)
        message = messages.Request(call=front.call(), connection=number, body=request)
        assert reason(front.ask(message)) == expected


@pytest.mark.parametrize(
    "sent",
    [(), (b"s",), (messages.PASSPHRASE,), (messages.PASSPHRASE + b"x" * 9000,), (b"[]",)],
    ids=["nothing", "no passphrase", "an empty one", "one that is too long", "a message"],
)
def test_compromised_front_can_not_stall_a_job_with_its_passphrase_channel(
    broker: Daemon, front: CompromisedFront, image: Path, sent: tuple[bytes, ...]
) -> None:
    """The call ends at once, or after a few seconds; the broker does not know of any of it."""
    dest = values.Destination(
        path=str(image.with_suffix(".out")),
        format="luks",
        encryption=values.DestinationEncryption(),
    )
    before = compromised_front.descriptors_of(broker.pid)
    policy_allows = dataclasses.replace(conversion(image, image), dest=dest)
    with compromised_front.connected(broker, DORA):
        number, call = connection_of(front), front.call()
        front.channel.send(messages.Request(call=call, connection=number, body=policy_allows))
        _, (descriptor,) = front.await_message(messages.Started, call)
        with channel.Channel(socket.socket(fileno=descriptor)) as line:
            for data in sent:
                line.send_bytes(data)
            failed, _ = line.receive(*messages.FROM_JOB)
            assert isinstance(failed, messages.Failed), failed
            assert failed.failure.reason in {"BAD_MESSAGE", "BAD_OPTION"}
        front.await_message(messages.Ended)
    await_descriptors(broker, front, before)


# --- whether it can bring the broker down --------------------------------------------------------


def hello_of(front: CompromisedFront) -> dict[str, Any]:
    """A valid request as JSON has it, to be corrupted."""
    request = conversion(Path("/a/b"), Path("/a/c"))
    message = messages.Request(call=front.call(), connection=1, body=request)
    loaded: dict[str, Any] = json.loads(codec.encode(message))[1]
    return loaded


def request_bytes(body: bytes, call: bytes = b"1", rest: bytes = b"") -> bytes:
    """A request as JSON has it, of such parts."""
    return b'["Request",{"call":%s,"connection":1,"body":%s%s}]' % (call, body, rest)


LIST: Final = b'["ListJobs",{"page_size":0,"page_token":""}]'


NO_MESSAGES: Final[dict[str, bytes]] = {
    "nothing at all": b"[]",
    "no JSON": b"\x00\xff",
    "of another class": b'["Peer",{"uid":0,"gid":0,"groups":[],"pid":1}]',
    "a broker's own": b'["Reply",{"call":1,"body":["ReplyComplete",{"next_page_token":""}]}]',
    "a field too many": request_bytes(LIST, rest=b',"uid":0'),
    "a field too few": b'["Request",{"call":1,"connection":1}]',
    "another type": request_bytes(LIST, call=b'"1"'),
    "true for 1": request_bytes(LIST, call=b"true"),
    "not a number": request_bytes(LIST, call=b"NaN"),
    "infinite": request_bytes(LIST, call=b"1e999"),
    "a number without end": request_bytes(LIST, call=b"9" * 5000),
    "too deep": b"[" * 100_000,
    "deep in a field": request_bytes(LIST, call=b"[" * 50_000 + b"]" * 50_000),
    "half a character": request_bytes(b'["CancelJob",{"job_id":"\\ud800"}]'),
    "too long": request_bytes(b'["CancelJob",{"job_id":"' + b"a" * 200_000 + b'"}]'),
    "a body without a name": request_bytes(b'{"job_id":"1"}'),
    "a body of another class": request_bytes(b'["Peer",{"uid":0,"gid":0,"groups":[],"pid":1}]'),
    "a message for a body": request_bytes(request_bytes(LIST)),
    "no body": request_bytes(b"null"),
}


@pytest.mark.parametrize("data", NO_MESSAGES.values(), ids=tuple(NO_MESSAGES))
def test_invalid_message_ends_the_front_and_nothing_else(
    broker: Daemon, front: CompromisedFront, data: bytes
) -> None:
    """It no longer speaks our language, so it is no longer ours; another one takes its place."""
    before = compromised_front.descriptors_of(broker.pid)
    front.channel.send_bytes(data)
    await_exit(front)
    front.take_over_next(broker)
    assert front.quiet()
    await_descriptors(broker, front, before)


def test_front_that_closes_its_channel_but_keeps_running_is_replaced(
    broker: Daemon, front: CompromisedFront
) -> None:
    """Else people would be let in whom nobody ever answers."""
    first = broker.await_one("convertd-front")
    front.close_channel()
    waiting.until(lambda: not processes.exists(first), "the front is killed")
    front.take_over_next(broker)
    assert front.quiet()


def test_front_that_stops_reading_is_replaced(broker: Daemon, front: CompromisedFront) -> None:
    """Until then it is not heard either: what it has not read does not fill the broker's memory."""
    first = broker.await_one("convertd-front")
    before = processes.anonymous_kib(broker.pid)
    message = codec.encode(messages.Request(call=1, connection=2**40, body=messages.ListJobs()))
    with contextlib.suppress(channel.Closed):
        while front.channel.send_bytes(message):
            pass
    waiting.until(lambda: not processes.exists(first), "the front is killed")
    front.take_over_next(broker)
    assert front.quiet()
    assert processes.anonymous_kib(broker.pid) < before + 16 * 1024


class Connections:
    """Those who connect, and go when others have: who is gone at once is not let in at all."""

    HERE: Final = 100

    def __init__(self, path: Path) -> None:
        """Of this socket."""
        self._path = str(path)
        self._here: collections.deque[socket.socket] = collections.deque()

    def connect(self) -> bool:
        """One more connects, if there is room."""
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        if sock.connect_ex(self._path):
            sock.close()
            return False
        self._here.append(sock)
        if len(self._here) > self.HERE:
            self._here.popleft().close()
        return True

    def close(self) -> None:
        """All go."""
        for sock in self._here:
            sock.close()


def test_front_that_shuts_down_half_its_channel_is_replaced(
    broker: Daemon, front: CompromisedFront
) -> None:
    """It would be sent nothing more, and no event of its descriptor tells of that."""
    first = broker.await_one("convertd-front")
    before = compromised_front.descriptors_of(broker.pid)
    front.channel.sock.shutdown(socket.SHUT_RD)
    with contextlib.closing(Connections(broker.socket)) as connections:
        while processes.exists(first):
            connections.connect()
    front.take_over_next(broker)
    assert front.quiet()
    await_descriptors(broker, front, before)


def test_front_that_reads_slowly_receives_all_replies(
    broker: Daemon, front: CompromisedFront
) -> None:
    """It is not heard while it does not read, and loses nothing by it."""
    first, asked = broker.await_one("convertd-front"), itertools.count()
    with compromised_front.connected(broker, ALICE):
        number = connection_of(front)

        def is_full() -> bool:
            """The broker sleeps though there is as much for it as the channel holds."""
            while front.channel.send(
                messages.Request(call=0, connection=number, body=messages.GetAccess()), wait=False
            ):
                next(asked)
            return processes.state(broker.pid) == "S"

        waiting.until(is_full, "the broker does not listen any more")
        for _ in range(next(asked)):
            front.await_message(results.Access)
        assert front.quiet()
    assert broker.await_one("convertd-front") == first


def test_broker_accepts_no_connection_while_the_front_does_not_read(
    broker: Daemon, front: CompromisedFront
) -> None:
    """Else whoever connects often enough would be the end of a front that is merely slow."""
    first = broker.await_one("convertd-front")

    connections = Connections(broker.socket)

    def is_full() -> bool:
        """The broker sleeps though as many as the backlog holds wait to be let in."""
        while connections.connect():
            pass
        return processes.state(broker.pid) == "S" and not connections.connect()

    with contextlib.closing(connections):
        waiting.until(is_full, "the broker lets nobody in any more")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        while sock.connect_ex(str(broker.socket)):
            message, descriptors = front.receive()
            assert isinstance(message, messages.Connected)
            scm_rights.close_all(descriptors)
        assert front.quiet()
    assert broker.await_one("convertd-front") == first


def test_front_that_dies_repeatedly_is_restarted_without_leaks(
    broker: Daemon, front: CompromisedFront
) -> None:
    """As long as each has served. The broker neither gives up nor leaks."""
    before = compromised_front.descriptors_of(broker.pid)
    for _ in range(6):
        os.kill(broker.await_one("convertd-front"), signal.SIGKILL)
        front.take_over_next(broker)
        assert front.quiet()
    await_descriptors(broker, front, before)


class Mutator:
    """Makes messages that are nearly right, or of the right types and mad."""

    def __init__(self, seed: int, paths: tuple[str, ...], numbers: tuple[int, ...]) -> None:
        """Draw from these paths and connections, and from worse."""
        self.random = random.Random(seed)  # noqa: S311 - a test's, to be repeated
        self.paths = paths
        self.numbers = (*numbers, 0, -1, 2**31, 2**63, 2**64, 10**30)

    def message(self, call: int) -> object:
        """A message of valid types."""
        pick, number = self.random, self.random.choice(self.numbers)
        kinds: tuple[Callable[[], object], ...] = (
            lambda: messages.Request(call=call, connection=number, body=self.conversion()),
            lambda: messages.Request(
                call=call, connection=number, body=values.InspectRequest(source=self.source())
            ),
            lambda: messages.Request(call=call, connection=number, body=messages.ListJobs()),
            lambda: messages.Request(
                call=call, connection=number, body=messages.CancelJob(job_id=self.text())
            ),
            lambda: messages.Request(call=call, connection=number, body=messages.GetAccess()),
            lambda: messages.CallAbandoned(call=pick.randrange(-1, call + 2)),
            lambda: messages.JobFinished(call=pick.randrange(-1, call + 2)),
            lambda: messages.Request(call=call, connection=number, body=messages.GetStats()),
            lambda: messages.ProbeAnswered(probe=pick.choice(self.numbers)),
            lambda: messages.Released(connection=self.random.choice(self.numbers[-6:])),
            lambda: messages.RequestRejected(
                connection=number,
                operation=pick.choice(tuple(messages.Operation)),
                reason=pick.choice(("BAD_PATH", self.text())),
            ),
            messages.Ready,
        )
        return pick.choice(kinds)()

    def conversion(self) -> values.ConvertRequest:
        """A request of valid types."""
        pick = self.random
        return values.ConvertRequest(
            source=self.source(),
            dest=self.dest(),
            cache_mode=pick.choice(tuple(values.CacheMode)[1:]),
            verify=pick.random() < 0.2,
            rate_limit_bytes_per_second=pick.choice((0, 0, 0, 1, -1, values.MIB, 2**70)),
            validate_only=pick.random() < 0.5,
            label=self.text(),
            reflink=pick.choice(tuple(values.Reflink)[1:]),
        )

    def source(self) -> values.Source:
        """A source of valid types."""
        pick = self.random
        formats = ("raw", "raw", "qcow2", "", "luks", "vmdk", self.text())
        encryption = values.SourceEncryption() if pick.random() < 0.1 else None
        return values.Source(path=self.path(), format=pick.choice(formats), encryption=encryption)

    def dest(self) -> values.Destination:
        """A destination of valid types."""
        pick = self.random
        names = ("cluster_size", "compat", "lazy_refcounts", "backing_file", self.text())
        option_values = ("on", "65536", "1.1", self.text(), self.path())
        return values.Destination(
            path=self.path(),
            format=pick.choice(("raw", "raw", "qcow2", "qcow2", "luks", "dmg", self.text())),
            compression=pick.choice(tuple(values.Compression)[1:]),
            preallocation=pick.choice((values.Preallocation.OFF, *tuple(values.Preallocation)[1:])),
            mode=pick.choice((None, None, 0o600, 0o666, 0o7777, -1, 2**40)),
            group=pick.choice(("", "", "root", "0", str(ALICE.gid), self.text())),
            overwrite=pick.random() < 0.3,
            is_zero=pick.random() < 0.05,
            encryption=None
            if pick.random() < 0.9
            else values.DestinationEncryption(iter_time_milliseconds=1),
            options=tuple(
                values.CreationOption(name=pick.choice(names), value=pick.choice(option_values))
                for _ in range(pick.choice((0, 0, 0, 1, 3)))
            ),
        )

    def path(self) -> str:
        """A path that exists, or one that should."""
        pick = self.random
        path = pick.choice(self.paths)
        return pick.choice((path, path, path, f"{path}-{pick.randrange(9)}", self.text()))

    def text(self) -> str:
        """Anything that can be said."""
        pick = self.random
        letters = (*string.printable, "\0", "\x7f", "é", "\u202e", "\U0001f600", "/", "/", "..")
        return "".join(pick.choices(letters, k=pick.choice((0, 1, 5, 40, 4000))))


def test_random_requests_of_a_compromised_front_stay_within_the_policy(
    broker: Daemon, front: CompromisedFront, image: Path, secret: Secret
) -> None:
    """Hundreds of them, from a front that knows all numbers and paths, and drops what it hears."""
    outside = (str(secret.raw), str(image.parent.parent.parent / "others" / "a"), "/etc/shadow")
    inside = tuple(str(image.with_name(name)) for name in ("image.raw", "a", "b"))
    image.write_bytes(image.read_bytes()[: 256 * 1024])
    before = compromised_front.descriptors_of(broker.pid)
    with compromised_front.connected(broker, ALICE), compromised_front.connected(broker, MALLORY):
        numbers = (connection_of(front), connection_of(front))
        mutator = Mutator(SEED, (*inside, *inside, *outside), numbers)
        for call in range(10, 10 + MESSAGES):
            data = codec.encode(mutator.message(call))
            while not front.channel.send_bytes(data, wait=False):
                _discard_received(front)
            _discard_received(front)
        assert front.quiet()
    assert broker.await_one("convertd-front")
    broker.await_none(QEMU_IMG)
    broker.await_none(JOB)
    await_descriptors(broker, front, before)
    assert secret.unchanged()
    assert {path.stat().st_uid for path in image.parent.iterdir()} == {ALICE.uid}
    assert not any(simple_calls.contains(path, secret.marker) for path in image.parent.iterdir())


def test_random_requests_cover_every_request_type() -> None:
    """One that is added later is tried as well, or this fails."""
    mutator = Mutator(SEED, ("/a",), (1,))
    made = [mutator.message(call) for call in range(1000)]
    assert {type(message) for message in made} == set(messages.FROM_FRONT)
    bodies = {type(message.body) for message in made if isinstance(message, messages.Request)}
    assert bodies == set(get_args(messages.RequestBody))


def _discard_received(front: CompromisedFront) -> None:
    try:
        while True:
            _, descriptors = front.channel.receive(
                *messages.FROM_BROKER, wait=False, most_descriptors=channel.ONE_DESCRIPTOR
            )
            scm_rights.close_all(descriptors)
    except BlockingIOError:
        return


def test_mutated_messages_never_end_the_broker(broker: Daemon, front: CompromisedFront) -> None:
    """A valid request with one thing in it replaced: each either is answered or ends the front."""
    pick = random.Random(SEED)  # noqa: S311 - a test's, to be repeated
    junk: tuple[Any, ...] = (None, True, -1, 1.5, 10**400)
    junk += ("", "x" * 9000, "\0", "raw", [], [[]], {}, {"a": 1})
    before = compromised_front.descriptors_of(broker.pid)
    for _ in range(MUTATED):
        corrupted = hello_of(front)
        request = corrupted["body"][1]
        part: dict[str, Any] = pick.choice((corrupted, request, request["source"], request["dest"]))
        key = pick.choice(tuple(part))
        if pick.random() < 0.2:
            del part[key]
        else:
            part[key] = pick.choice(junk)
        data = json.dumps(["Request", corrupted]).encode()
        front.channel.send_bytes(data)
        if is_a_message(data):
            assert front.quiet()
        else:
            await_exit(front)
            front.take_over_next(broker)
    assert front.quiet()
    await_descriptors(broker, front, before)


def is_a_message(data: bytes) -> bool:
    """Whether it is one that a front may send."""
    try:
        codec.decode(data, *messages.FROM_FRONT)
    except codec.CodecError:
        return False
    return True


def await_exit(front: CompromisedFront) -> None:
    """Wait until the broker has had enough of it."""
    with pytest.raises(channel.Closed):
        front.await_message(messages.LocalRequest)
