"""The relay: bytes both ways, a name that tells whose they are, and an end for every connection."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import resource
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path

import descriptors
import pytest
from children import in_child
from descriptors import none_left_open

from convertd_daemon.front import header_filter, relay, streams

KIB = 1024
MIB = 1024 * KIB

DEADLINE_S = 60.0


def unchanged(data: bytes) -> Iterable[header_filter.Piece]:
    """All of it passes, and is no call."""
    return (header_filter.Piece(data, begins_call=False),)


def unfiltered(_calls: streams.Streams) -> relay.Filtered:
    """What passes is of no interest here; tests of the filter tell."""
    return unchanged


class Upstream:
    """What stands in for gRPC: it accepts, and says what a test wants it to say."""

    def __init__(self, path: Path, backlog: int = 16) -> None:
        self.path = str(path)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.sock.bind(self.path)
        self.sock.listen(backlog)

    async def accept(self) -> tuple[socket.socket, str]:
        """Take the next connection, and what gRPC would call its peer."""
        sock, address = await asyncio.get_running_loop().sock_accept(self.sock)
        return sock, f"unix-abstract:{address[1:].decode()}"


class Peer:
    """Somebody connected to the daemon. The broker keeps a descriptor of its own."""

    def __init__(self) -> None:
        self.sock, accepted = socket.socketpair()
        self.brokers = accepted.dup()
        self.sock.setblocking(False)
        self.descriptor = accepted.detach()

    async def send(self, data: bytes) -> None:
        """Send all of it."""
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive(self, count: int = 64 * KIB) -> bytes:
        """Receive something, or nothing at the end."""
        return await asyncio.get_running_loop().sock_recv(self.sock, count)

    def close(self) -> None:
        """Close what is the peer's and what is the broker's."""
        self.sock.close()
        self.brokers.close()


@pytest.fixture
def path() -> Iterator[Path]:
    """Where gRPC listens."""
    with tempfile.TemporaryDirectory(dir="/run") as directory:
        yield Path(directory) / "grpc.sock"


@contextlib.asynccontextmanager
async def relayed(path: Path) -> AsyncIterator[tuple[relay.Relay, Peer, socket.socket, str]]:
    """A connection that is relayed: the relay, both far ends, and the name gRPC has for it."""
    upstream, peer, a_relay = Upstream(path), Peer(), relay.Relay(str(path), unfiltered)
    with contextlib.closing(upstream.sock), contextlib.closing(peer):
        a_relay.relay(7, peer.descriptor, 1234, lambda: None)
        there, name = await upstream.accept()
        with contextlib.closing(there):
            yield a_relay, peer, there, name
        peer.sock.close()
        await a_relay.drain(DEADLINE_S)
        assert len(a_relay) == 0


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test in a loop of its own, in which nothing hangs and nothing is left over."""

    async def bounded() -> None:
        await asyncio.wait_for(test(), DEADLINE_S)

    with none_left_open():
        asyncio.run(bounded())


def bound_names() -> int:
    """How many sockets of this process have a name of the relay's."""
    ours = {name for _, name in descriptors.open_descriptors()}
    sockets = [line.split() for line in Path("/proc/net/unix").read_text("utf-8").splitlines()]
    named = (one for one in sockets if one[-1].startswith("@convertd-"))
    return sum(f"socket:[{one[6]}]" in ours for one in named)


async def until(fact: Callable[[], bool]) -> None:
    """Let the loop run until something is so."""
    while not fact():  # noqa: ASYNC110 - nobody sets an event for it
        await asyncio.sleep(0.001)


async def receive_all(sock: socket.socket, count: int) -> bytes:
    """Receive so many bytes."""
    loop, data = asyncio.get_running_loop(), bytearray()
    while len(data) < count and (piece := await loop.sock_recv(sock, 64 * KIB)):
        data += piece
    return bytes(data)


def test_relay_copies_bytes_both_ways_unchanged(path: Path) -> None:
    """However many, and at once."""
    data = os.urandom(3 * MIB)

    async def test() -> None:
        async with relayed(path) as (_, peer, there, _):
            loop = asyncio.get_running_loop()
            _, up, _, down = await asyncio.gather(
                peer.send(data),
                receive_all(there, len(data)),
                loop.sock_sendall(there, data[::-1]),
                receive_all(peer.sock, len(data)),
            )
            assert up == data
            assert down == data[::-1]

    run(test)


def test_relay_delivers_what_the_server_sends_first(path: Path) -> None:
    """An HTTP/2 server does not wait to be asked."""

    async def test() -> None:
        async with relayed(path) as (_, peer, there, _):
            there.send(b"settings")
            assert await peer.receive() == b"settings"

    run(test)


def test_relay_socket_name_maps_to_the_connection_number_of_the_broker(path: Path) -> None:
    """For as long as the connection is there, and no longer; another name leads to nobody."""

    async def test() -> None:
        async with relayed(path) as (a_relay, peer, there, name):
            assert a_relay.connection_of(name) == 7
            assert a_relay.connection_of(f"{name}0") is None
            assert a_relay.connection_of("unix:") is None
            peer.sock.close()
            assert await asyncio.get_running_loop().sock_recv(there, 1) == b""
            await until(lambda: a_relay.connection_of(name) is None)

    run(test)


def test_relay_socket_names_are_never_reused(path: Path) -> None:
    """Even of one peer, one after the other."""

    async def test() -> None:
        upstream, a_relay = Upstream(path), relay.Relay(str(path), unfiltered)
        names = {}
        with contextlib.closing(upstream.sock):
            for number in range(20):
                peer = Peer()
                a_relay.relay(number, peer.descriptor, 1234, lambda: None)
                there, name = await upstream.accept()
                names[name] = a_relay.connection_of(name)
                there.close()
                peer.close()
            await a_relay.drain(DEADLINE_S)
        assert sorted(filter(None, names.values())) == list(range(1, 20))
        assert len(names) == 20

    run(test)


def test_closing_peer_ends_its_connection_after_its_last_bytes(path: Path) -> None:
    """What it had said still arrives."""

    async def test() -> None:
        async with relayed(path) as (_, peer, there, _):
            await peer.send(b"last words")
            peer.sock.close()
            assert await receive_all(there, 100) == b"last words"

    run(test)


def test_connection_closed_by_the_server_is_closed_for_the_peer(path: Path) -> None:
    """Though the broker still holds a descriptor of it: close() alone would leave it open."""

    async def test() -> None:
        async with relayed(path) as (_, peer, there, _):
            await asyncio.get_running_loop().sock_sendall(there, b"goaway")
            there.close()
            assert await receive_all(peer.sock, 100) == b"goaway"
            assert await peer.receive() == b""

    run(test)


def test_half_closed_connection_is_closed(path: Path) -> None:
    """There is no half-open connection in gRPC, and one would be a descriptor for nothing."""

    async def test() -> None:
        async with relayed(path) as (_, peer, there, _):
            await peer.send(b"x")
            peer.sock.shutdown(socket.SHUT_WR)
            assert await receive_all(there, 100) == b"x"
            assert await peer.receive() == b""

    run(test)


def test_data_with_a_descriptor_ends_its_own_connection_only(path: Path) -> None:
    """It is never read, so that nobody waits for its close; then the broker hears of the end."""

    async def test() -> None:
        upstream, peer, a_relay = Upstream(path), Peer(), relay.Relay(str(path), unfiltered)
        released = asyncio.Event()
        with contextlib.closing(upstream.sock), contextlib.closing(peer):
            a_relay.relay(7, peer.descriptor, 1234, released.set)
            there, _ = await upstream.accept()
            with contextlib.closing(there):
                await peer.send(b"first")
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))]
                peer.sock.sendmsg([b"second"], rights)
                assert b"first".startswith(await receive_all(there, 100))
                await released.wait()
            assert peer.brokers.recvmsg(100, 0, socket.MSG_PEEK)[2] & socket.MSG_CTRUNC

    run(test)


def test_relay_waits_for_a_full_server_backlog_without_blocking_others(path: Path) -> None:
    """AF_UNIX answers EAGAIN; the peer's bytes wait meanwhile, and nobody else does."""

    async def test() -> None:
        upstream, a_relay = Upstream(path, backlog=0), relay.Relay(str(path), unfiltered)
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(upstream.sock))
            peers = [stack.enter_context(contextlib.closing(Peer())) for _ in range(8)]
            for number, peer in enumerate(peers):
                a_relay.relay(number, peer.descriptor, 1234, lambda: None)
                await peer.send(b"%d" % number)
            # From then on each of them tries to connect, and one has room.
            await until(lambda: bound_names() == len(peers))
            await asyncio.sleep(0)
            heard = set()
            for _ in peers:
                there, name = await upstream.accept()
                stack.enter_context(contextlib.closing(there))
                data = await asyncio.get_running_loop().sock_recv(there, 10)
                assert data == b"%d" % (a_relay.connection_of(name) or 0)
                heard.add(data)
            assert len(heard) == len(peers)
        await a_relay.drain(DEADLINE_S)

    run(test)


def test_connection_of_a_departed_peer_does_not_reach_the_server(path: Path) -> None:
    """Nor one that leaves while it waits for room: neither costs more than a look."""

    async def test() -> None:
        upstream, a_relay = Upstream(path, backlog=0), relay.Relay(str(path), unfiltered)
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(upstream.sock))
            gone, first, waiting = (
                stack.enter_context(contextlib.closing(Peer())) for _ in range(3)
            )
            gone.sock.close()
            for number, peer in enumerate((gone, first, waiting)):
                a_relay.relay(number, peer.descriptor, 1234, lambda: None)
            await until(lambda: len(a_relay) == 2)
            waiting.sock.close()
            await until(lambda: len(a_relay) == 1)
            there, name = await upstream.accept()
            stack.enter_context(contextlib.closing(there))
            assert a_relay.connection_of(name) == 1
            with pytest.raises(BlockingIOError):
                upstream.sock.accept()
        await a_relay.drain(DEADLINE_S)

    run(test)


@pytest.mark.parametrize("writer", ["server", "peer"])
def test_peer_that_does_not_read_blocks_only_its_own_connection(path: Path, writer: str) -> None:
    """What waits is bounded: memory can't be filled by asking much and reading nothing."""

    async def test() -> None:
        async with relayed(path) as (a_relay, peer, there, _):
            sink = there if writer == "server" else peer.sock
            sent = await fill(sink)
            assert sent < 4 * MIB
            other = Peer()
            with contextlib.closing(other):
                upstream = a_relay.upstream_path
                a_relay.upstream_path = f"{upstream}.2"
                second = Upstream(Path(a_relay.upstream_path))
                with contextlib.closing(second.sock):
                    a_relay.relay(8, other.descriptor, 1235, lambda: None)
                    far, _ = await second.accept()
                    with contextlib.closing(far):
                        await other.send(b"x")
                        assert await asyncio.get_running_loop().sock_recv(far, 2) == b"x"
                os.unlink(a_relay.upstream_path)
            # And once it reads, everything is there.
            source = peer.sock if writer == "server" else there
            assert len(await receive_all(source, sent)) == sent

    run(test)


def test_peer_that_does_not_read_its_replies_is_not_read(path: Path) -> None:
    """Until it reads: else what gRPC has to tell it would pile up there."""

    async def test() -> None:
        async with relayed(path) as (_, peer, there, _):
            answered = await fill(there)
            await peer.send(b"a question")
            assert await fill(there) == 0
            with pytest.raises(BlockingIOError):
                there.recv(1)
            assert len(await receive_all(peer.sock, answered)) == answered
            assert await asyncio.get_running_loop().sock_recv(there, 100) == b"a question"

    run(test)


def letter_by_letter(data: bytes) -> Iterable[header_filter.Piece]:
    """Pieces of one byte."""
    return (header_filter.Piece(bytes([byte]), begins_call=False) for byte in data)


def test_relay_reads_peers_by_fair_turns(path: Path) -> None:
    """Of its user: who says little is not behind all that another says."""

    async def test() -> None:
        much, little = Peer(), Peer()
        upstream = Upstream(path)
        a_relay = relay.Relay(str(path), lambda _: letter_by_letter)
        with (
            contextlib.closing(upstream.sock),
            contextlib.closing(much),
            contextlib.closing(little),
        ):
            a_relay.relay(1, much.descriptor, 1234, lambda: None)
            at_much, _ = await upstream.accept()
            a_relay.relay(2, little.descriptor, 1235, lambda: None)
            at_little, _ = await upstream.accept()
            with contextlib.closing(at_much), contextlib.closing(at_little):
                await much.send(b"m" * 4 * KIB)
                await asyncio.get_running_loop().sock_recv(at_much, 1)
                await little.send(b"l")
                assert await asyncio.get_running_loop().sock_recv(at_little, 1) == b"l"
                assert len(at_much.recv(4 * KIB)) < KIB
            much.sock.close()
            little.sock.close()
            await a_relay.drain(DEADLINE_S)

    run(test)


def test_relay_inspects_received_data_by_fair_turns(path: Path) -> None:
    """Many connections of one user's that all have much to look through are not all in a row."""
    looked: list[int] = []

    async def test() -> None:
        loop, now = asyncio.get_running_loop(), 0

        def count() -> None:
            nonlocal now
            now += 1
            loop.call_soon(count)

        def look(_data: bytes) -> Iterable[header_filter.Piece]:
            looked.append(now)
            yield header_filter.Piece(b"a header block", begins_call=False)

        upstream, peers = Upstream(path), [Peer() for _ in range(8)]
        a_relay = relay.Relay(str(path), lambda _: look)
        with contextlib.ExitStack() as ends:
            ends.enter_context(contextlib.closing(upstream.sock))
            for number, peer in enumerate(peers):
                ends.enter_context(contextlib.closing(peer))
                a_relay.relay(number, peer.descriptor, 1234, lambda: None)
                there, _ = await upstream.accept()
                ends.enter_context(contextlib.closing(there))
            count()
            for peer in peers:
                peer.sock.send(b"all at once")
            await until(lambda: len(looked) == len(peers))
            for peer in peers:
                peer.sock.close()
            await a_relay.drain(DEADLINE_S)

    run(test)
    assert len(set(looked)) == len(looked)


async def fill(sink: socket.socket) -> int:
    """Write until nothing more is taken, and tell how much was."""
    sent, refused = 0, 0
    while refused < 20:
        try:
            sent += sink.send(bytes(64 * KIB))
            refused = 0
        except BlockingIOError:
            refused += 1
            await asyncio.sleep(0.001)
    return sent


def test_connection_without_a_server_is_closed(path: Path) -> None:
    """It is not kept for one that may come."""

    async def test() -> None:
        a_relay, peer = relay.Relay(str(path), unfiltered), Peer()
        with contextlib.closing(peer):
            a_relay.relay(1, peer.descriptor, 1234, lambda: None)
            assert await peer.receive() == b""
        await a_relay.drain(DEADLINE_S)
        assert len(a_relay) == 0

    run(test)


def test_connection_is_closed_when_no_descriptor_is_free(path: Path) -> None:
    """And the next one, when there are some again, is relayed."""

    async def scene() -> None:
        upstream, a_relay, peer, late = (
            Upstream(path),
            relay.Relay(str(path), unfiltered),
            Peer(),
            Peer(),
        )
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        a_relay.relay(1, peer.descriptor, 1234, lambda: None)
        assert await peer.receive() == b""
        await a_relay.drain(DEADLINE_S)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert (len(a_relay), bound_names()) == (0, 0)
        a_relay.relay(2, late.descriptor, 1234, lambda: None)
        _, name = await upstream.accept()
        assert a_relay.connection_of(name) == 2

    def act() -> str:
        complaints: list[object] = []
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context["message"]))
        loop.run_until_complete(asyncio.wait_for(scene(), DEADLINE_S))
        return str(complaints)

    assert in_child(act) == "[]"


def test_relay_shutdown_ends_within_its_time_limit(path: Path) -> None:
    """What does not end in its time is left."""

    async def test() -> None:
        async with relayed(path) as (a_relay, _, _, _):
            await a_relay.drain(0.01)
            assert len(a_relay) == 1
        await a_relay.drain(0.01)
        assert len(a_relay) == 0

    run(test)
