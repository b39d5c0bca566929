"""Bytes that are no gRPC, gRPC that is no request, requests that are mad: nobody else notices."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from harness import processes
from harness.agent import METHODS, Agent
from harness.callers import ALICE, BOB, MALLORY, SERVICE, Caller
from harness.daemon import FRONT, Daemon
from hostile import http2, simple_calls
from hostile.http2 import Kind
from policies import IMAGES, Grant, Policy

from convertd.v1 import convert_pb2 as pb

POLICY: Final = Policy(grants=[Grant(read=[IMAGES], write=[IMAGES])])

COUNT: Final = int(os.environ.get("CONVERTD_TEST_WIRE", "150"))
"""How many connections, and how many requests, each kind of fuzz gets."""

SEED: Final = int(os.environ.get("CONVERTD_TEST_SEED", "1"))

MIB: Final = 1024
"""In KiB, as memory is measured here."""


@pytest.fixture(autouse=True)
def unaffected(daemon: Daemon) -> Iterator[None]:
    """After each test the same front serves others, without having grown."""
    front = daemon.await_one(FRONT)
    before = processes.anonymous_kib(front)
    yield
    assert daemon.await_one(FRONT) == front
    assert daemon.agent(BOB).access().uid == BOB.uid
    assert processes.anonymous_kib(front) < before + 64 * MIB


def base(pick: random.Random) -> bytes:
    """A connection as it should be, with a few calls."""
    paths = ("GetAccess", "ListJobs", "Convert", "Inspect", "CancelJob", "Nothing")
    calls = (http2.call(2 * n + 1, pick.randbytes(n), pick.choice(paths)) for n in range(3))
    return http2.opening(*calls)


def mutated(pick: random.Random, data: bytes) -> bytes:
    """With some of its bytes changed, doubled, dropped or moved."""
    corrupted = bytearray(data)
    for _ in range(pick.choice((1, 2, 8))):
        at = pick.randrange(len(corrupted))
        part = corrupted[at : at + pick.choice((1, 9, 40))]
        match pick.randrange(5):
            case 0:
                corrupted[at] ^= 1 << pick.randrange(8)
            case 1:
                corrupted[at : at + 4] = struct.pack(
                    ">I", pick.choice((0, 1, 2**31 - 1, 2**32 - 1))
                )
            case 2:
                corrupted[at:at] = part
            case 3:
                del corrupted[at : at + len(part)]
            case 4:
                corrupted += part * pick.choice((1, 100))
        corrupted = corrupted or bytearray(b"\0")
    return bytes(corrupted)


def random_frames(pick: random.Random) -> bytes:
    """Frames of every kind, and of none, in no order."""
    return http2.opening(
        *(
            http2.frame(
                pick.choice((*Kind, pick.randrange(256))),
                pick.randbytes(pick.choice((0, 1, 4, 5, 8, 100, 5000))),
                flags=pick.choice((0, 1, 4, 5, 8, 0x20, 0xFF)),
                stream=pick.choice((0, 1, 1, 3, 5, 2**31 - 1, 2**31)),
            )
            for _ in range(pick.randrange(1, 40))
        )
    )


FUZZ: Final[dict[str, Callable[[random.Random], bytes]]] = {
    "noise": lambda pick: pick.randbytes(pick.choice((1, 24, 4000))),
    "noise after a preface": lambda pick: http2.opening(pick.randbytes(pick.choice((9, 4000)))),
    "mutated": lambda pick: mutated(pick, base(pick)),
    "random frames": random_frames,
}


@pytest.mark.parametrize("make", FUZZ.values(), ids=tuple(FUZZ))
def test_random_bytes_end_at_most_their_own_connection(
    daemon: Daemon, make: Callable[[random.Random], bytes]
) -> None:
    """From a user who may do nothing at all."""
    pick = random.Random(SEED)  # noqa: S311 - a test's, to be repeated
    for _ in range(COUNT):
        with http2.connected(daemon.socket, MALLORY) as sock:
            http2.sent(sock, make(pick))
            http2.answer(sock, pick.choice((0.0001, 0.01)))


HEADER_BLOCK: Final = http2.block()

BOMBS: Final[dict[str, bytes]] = {
    # CVE-2023-44487, and its kin.
    "streams opened and reset": b"".join(
        http2.frame(Kind.HEADERS, HEADER_BLOCK, flags=5, stream=2 * n + 1)
        + http2.frame(Kind.RST_STREAM, struct.pack(">I", 8), stream=2 * n + 1)
        for n in range(5000)
    ),
    # CVE-2024-27316.
    "a header without end": http2.frame(Kind.HEADERS, HEADER_BLOCK, stream=1)
    + http2.frame(Kind.CONTINUATION, http2.block(((b"a", b"b" * 16000),)), stream=1) * 400,
    # CVE-2019-9512, -9515, -9518.
    "pings": http2.frame(Kind.PING, bytes(8)) * 20000,
    "settings": http2.frame(Kind.SETTINGS) * 20000,
    "empty frames": http2.frame(Kind.HEADERS, HEADER_BLOCK, flags=4, stream=1)
    + http2.frame(Kind.DATA, stream=1) * 50000,
    # CVE-2016-6581: one entry of the table, said again and again.
    "a header table": http2.frame(
        Kind.HEADERS, b"\x40\1a\x7f\x81\x1e" + b"b" * 4000 + b"\xbe" * 12000, flags=5, stream=1
    )
    * 20,
    "a window that overflows": http2.frame(Kind.WINDOW_UPDATE, b"\x7f\xff\xff\xff") * 3,
    "a window of nothing": http2.frame(Kind.SETTINGS, struct.pack(">HI", 4, 0))
    + b"".join(http2.call(2 * n + 1) for n in range(100)),
    "a message of 4 GiB": http2.frame(Kind.HEADERS, HEADER_BLOCK, flags=4, stream=1)
    + http2.frame(Kind.DATA, http2.message(b"a" * 1000, 2**32 - 1), stream=1) * 60,
    "messages that never end": b"".join(
        http2.frame(Kind.HEADERS, HEADER_BLOCK, flags=4, stream=2 * n + 1)
        + http2.frame(Kind.DATA, http2.message(b"a" * 1000, 200_000), stream=2 * n + 1)
        for n in range(1000)
    ),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=tuple(BOMBS))
def test_hostile_http2_frames_end_at_most_their_own_connection(daemon: Daemon, bomb: bytes) -> None:
    """Each is somebody's CVE, or looks like one."""
    with http2.connected(daemon.socket, MALLORY) as sock:
        http2.sent(sock, http2.opening(bomb))
        http2.answer(sock, 0.2)


def test_user_at_the_connection_limit_does_not_keep_other_users_out(daemon: Daemon) -> None:
    """Those that were opened say nothing, and those that were refused come again."""
    before = len(processes.descriptors(daemon.pid))
    held = []
    for _ in range(300):
        sock = http2.connected(daemon.socket, MALLORY)
        held.append((sock, sock.__enter__()))
    try:
        assert daemon.agent(ALICE).access().uid == ALICE.uid
        assert len(processes.descriptors(daemon.pid)) <= before + 128 + 16
    finally:
        for context, _ in held:
            context.__exit__(None, None, None)


def checked(agent: Agent, method: str, data: bytes) -> str:
    """How a call with any bytes ended. A refusal has exactly one reason, and is no bug."""
    return simple_calls.outcome_of(agent.call(method, data)).status


def valid(pick: random.Random) -> bytes:
    """A request with everything in it."""
    path = pick.choice(("/etc/shadow", "/a" * 2000, "a", ""))
    return pb.ConvertRequest(
        source=pb.Source(
            path=path, format="qcow2", encryption=pb.SourceEncryption(passphrase=b"p")
        ),
        dest=pb.Destination(
            path=f"{path}.out",
            format=pick.choice(("raw", "qcow2", "")),
            compression=pb.COMPRESSION_ZSTD,
            mode=0o640,
            group="disk",
            qcow2=pb.Qcow2Options(cluster_size_bytes=4096),
            encryption=pb.DestinationEncryption(passphrase=b"p"),
        ),
        cache_mode=pb.CACHE_MODE_NONE,
        reflink=pb.REFLINK_AUTO,
        label="a label",
    ).SerializeToString()


MESSAGES: Final[dict[str, Callable[[random.Random], bytes]]] = {
    "noise": lambda pick: pick.randbytes(pick.choice((1, 10, 300))),
    "mutated": lambda pick: mutated(pick, valid(pick)),
}


@pytest.mark.parametrize("make", MESSAGES.values(), ids=tuple(MESSAGES))
@pytest.mark.parametrize("caller", [ALICE, MALLORY], ids=["granted", "not granted"])
def test_random_bytes_as_a_request_get_a_status_with_a_reason(
    daemon: Daemon, make: Callable[[random.Random], bytes], caller: Caller
) -> None:
    """With a status and a reason, never with UNKNOWN, never with a traceback."""
    pick = random.Random(SEED)  # noqa: S311 - a test's, to be repeated
    agent = daemon.agent(caller)
    for number in range(COUNT):
        method = tuple(METHODS)[number % len(METHODS)]
        assert checked(agent, method, make(pick)) not in {"UNKNOWN", "INTERNAL", "UNAVAILABLE"}


# By their numbers on the wire: typed code can't say what no enum has.
ENUMS: Final[dict[str, bytes]] = {
    "cache_mode": b"\x18\x63",
    "reflink": b"\x40\x63",
    "dest.compression": b"\x12\x02\x20\x63",
    "dest.preallocation": b"\x12\x02\x28\x63",
    "source.encryption.format": b"\x0a\x04\x1a\x02\x10\x63",
}


def test_enum_numbers_in_the_requests_match_the_contract() -> None:
    """Or the next test would send unknown fields, which are ignored."""
    assert pb.ConvertRequest.FromString(ENUMS["cache_mode"]).cache_mode == 99
    assert pb.ConvertRequest.FromString(ENUMS["reflink"]).reflink == 99
    assert pb.ConvertRequest.FromString(ENUMS["dest.compression"]).dest.compression == 99
    assert pb.ConvertRequest.FromString(ENUMS["dest.preallocation"]).dest.preallocation == 99
    source = pb.ConvertRequest.FromString(ENUMS["source.encryption.format"]).source
    assert source.encryption.format == 99


@pytest.mark.parametrize("data", ENUMS.values(), ids=tuple(ENUMS))
def test_unknown_enum_value_is_refused(daemon: Daemon, data: bytes) -> None:
    """It is not taken for the default."""
    assert checked(daemon.agent(ALICE), "Convert", data) == "INVALID_ARGUMENT"


@pytest.mark.parametrize("size", [5_000, 100_000, 170_000, 220_000, 262_000])
@pytest.mark.parametrize("letter", ["a", "\x01", "\U0001f600"], ids=["letter", "escape", "astral"])
def test_oversized_field_ends_only_its_own_call(daemon: Daemon, size: int, letter: str) -> None:
    """One of these once stuck in the front's queue for the broker, and all after it."""
    text = letter * (size // len(letter.encode()))
    agent = daemon.agent(MALLORY)
    requests = (
        ("CancelJob", pb.CancelJobRequest(job_id=text)),
        ("Inspect", pb.InspectRequest(source=pb.Source(path=f"/{text}"))),
        ("Convert", pb.ConvertRequest(label=text, source=pb.Source(path="/a", format="raw"))),
    )
    for method, request in requests:
        status = checked(agent, method, request.SerializeToString())
        assert status in {"INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED"}
        assert daemon.agent(BOB).access().uid == BOB.uid


def test_caller_in_too_many_groups_for_the_reply_gets_a_condition(daemon: Daemon) -> None:
    """With subordinate ids anybody can be in 65,536. GetAccess once ended the broker then."""
    crowd = Caller(uid=1777, gid=1777, groups=tuple(range(100_000, 165_000)))
    call = daemon.agent(crowd).call("GetAccess", pb.GetAccessRequest())
    assert call.refusal().reason == "UNSUPPORTED"
    assert daemon.agent(crowd).jobs() == []


def test_path_with_invalid_utf8_ends_only_its_own_connection(daemon: Daemon) -> None:
    """It once ended gRPC's one loop, and nobody was served any more."""
    path = f"/{SERVICE}/Get\N{LATIN SMALL LETTER E WITH ACUTE}".encode("latin-1")
    headers = tuple((name, path if name == b":path" else value) for name, value in http2.HEADERS)
    bad = http2.frame(Kind.HEADERS, http2.block(headers), flags=5, stream=1)
    # Too short for the priority that it should have: gRPC takes these two bytes for the beginning
    # of the block, a path of four bytes.
    cut_off = http2.frame(Kind.HEADERS, b"\x04\x04", flags=0x21, stream=1) + http2.frame(
        Kind.CONTINUATION,
        b"/\xff\xfe/" + http2.block((*headers[:2], *headers[3:])),
        flags=4,
        stream=1,
    )
    for data in (http2.opening(bad), http2.opening(http2.call(3), bad), http2.opening(cut_off)):
        with http2.connected(daemon.socket, MALLORY) as sock:
            http2.sent(sock, data)
            http2.answer(sock, 0.2)
        assert daemon.agent(BOB).access().uid == BOB.uid


def test_peer_can_not_forge_a_log_line_with_http2_debug_text(
    daemon: Daemon, tmp_path: Path
) -> None:
    """By whatever gRPC might log: the text of a GOAWAY was, newlines and all."""
    forged = b"\nINFO convertd.audit[1] operation=convert outcome=done uid=0 FORGED\n"
    names = (b":method", b":path", b"te", b"grpc-timeout", b"grpc-encoding", b"user-agent", b"x")
    blocks = [
        http2.block((*(item for item in http2.HEADERS if item[0] != name), (name, forged)))
        for name in names
    ]
    frames = [
        http2.frame(Kind.HEADERS, block, flags=5, stream=2 * number + 1)
        for number, block in enumerate(blocks)
    ]
    goodbye = http2.frame(Kind.GOAWAY, struct.pack(">II", 0, 2) + forged)
    for last in (goodbye, http2.frame(Kind.HEADERS, forged, flags=5, stream=99)):
        with http2.connected(daemon.socket, MALLORY) as sock:
            http2.sent(sock, http2.opening(*frames, last))
            http2.answer(sock, 0.2)
    path = tmp_path / f"a{forged.decode()}b"
    request = pb.ConvertRequest(label=forged.decode(), source=pb.Source(path=str(path)))
    agent = daemon.agent(MALLORY)
    for method in METHODS:
        checked(agent, method, request.SerializeToString())
    checked(agent, "CancelJob", pb.CancelJobRequest(job_id=forged.decode()).SerializeToString())
    assert not any(line.startswith("INFO convertd.audit[1]") for line in daemon.log.splitlines())


def test_call_without_a_request_is_ended(daemon: Daemon) -> None:
    """Whether it would have one reply or many, it is not left to wait for what will not come."""
    paths = ("/grpc.health.v1.Health/Watch", f"/{SERVICE}/GetAccess", f"/{SERVICE}/Convert")
    calls = {
        2 * number + 1: http2.block(
            tuple((n, path.encode() if n == b":path" else value) for n, value in http2.HEADERS)
        )
        for number, path in enumerate(paths)
    }
    with http2.connected(daemon.socket, ALICE) as sock:
        frames = (
            http2.frame(Kind.HEADERS, block, flags=5, stream=stream)
            for stream, block in calls.items()
        )
        http2.sent(sock, http2.opening(*frames))
        assert http2.ended(sock, len(calls)) == calls.keys()


def test_unknown_method_is_answered_unimplemented(daemon: Daemon) -> None:
    """Of ours, of another service, and of none."""
    for method in (f"/{SERVICE}/Nothing", "/a/b", "/", "//"):
        ended = daemon.agent(MALLORY).call(method, b"").end()
        assert ended.status in {"UNIMPLEMENTED", "UNKNOWN"}, ended
