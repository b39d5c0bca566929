"""Every refusal of the contract, on the real socket, as the real user.

Each has one status, one ErrorInfo with a reason, and in its metadata whatever the message says.
None leaves anything behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from harness import images
from harness.agent import METHODS, Agent, Refusal, conversion
from harness.callers import ALICE, BOB, MALLORY, ROOT
from harness.daemon import QEMU_IMG, Daemon
from harness.mounts import Mounts
from policies import IMAGES, LIBRARY, Grant, Policy, Root

from convertd.v1 import convert_pb2 as pb

OUTBOX: Final = Root("outbox", "{scratch}/outbox")
GONE: Final = Root("gone", "{scratch}/gone")
LINKED: Final = Root("linked", "{scratch}/linked")
POLICY: Final = Policy(
    limits={"virtual_size": "64 MiB"},
    operators=[0],
    roots=[Root("inner", "{scratch}/images/inner")],
    grants=[
        Grant(
            read=[LIBRARY, IMAGES, GONE, LINKED],
            write=[IMAGES, GONE, LINKED],
            formats=["raw", "qcow2", "vmdk"],
        ),
        Grant(read=[LIBRARY], write=[OUTBOX], write_formats=["raw"], read_formats=["raw"]),
        Grant(users=[1235], read=[LIBRARY], write=[IMAGES]),
    ],
)

MIB: Final = 1024 * 1024

Request = pb.ConvertRequest
Change = Callable[[Request], object]


@pytest.fixture
def alice(daemon: Daemon) -> Agent:
    """Calls as uid 1234."""
    return daemon.agent(ALICE)


@pytest.fixture
def source(library: Path) -> Path:
    """A raw image of 8 MiB that uid 1234 may have converted."""
    return library / "small.raw"


@pytest.fixture
def valid(source: Path, images_dir: Path) -> Request:
    """A request that would be granted, for a test to change."""
    return conversion(source, images_dir / "dest.qcow2")


@pytest.fixture
def slow(library: Path, images_dir: Path) -> Request:
    """A conversion that takes a minute."""
    source, dest = library / "bulky.raw", images_dir / "dest.qcow2"
    return conversion(source, dest, rate_limit_bytes_per_second=MIB)


@pytest.fixture(autouse=True)
def nothing_is_left(daemon: Daemon, scratch: Path, images_dir: Path) -> Iterator[None]:
    """No process, and no file but those that a test made as its bad input."""
    assert images_dir.exists()
    yield
    daemon.await_idle()
    names = [name for _, _, files in os.walk(scratch) for name in files]
    assert "dest.qcow2" not in names
    assert not [name for name in names if name.startswith(".convertd")]


def check(refusal: Refusal, status: str, reason: str, **metadata: str) -> None:
    """See that a refusal is what it should be, and that its message holds all of its metadata."""
    assert (refusal.status, refusal.reason) == (status, reason)
    assert refusal.metadata == metadata
    assert all(value in refusal.message for value in metadata.values())
    assert "\n" not in refusal.message
    if status == "FAILED_PRECONDITION":
        assert refusal.violations == ((reason, metadata.get("path", "")),)
    if status == "INVALID_ARGUMENT":
        assert refusal.fields == (metadata.get("field", ""),)


# --- what can't be meant: INVALID_ARGUMENT ------------------------------------------------------


@pytest.mark.parametrize("field", ["source.path", "dest.path"])
@pytest.mark.parametrize(
    ("path", "problem"),
    [
        pytest.param("", "is not absolute", id="empty"),
        pytest.param("images/disk.raw", "is not absolute", id="relative"),
        pytest.param("/images/../etc/shadow", "has '..' in it", id="parent"),
        pytest.param("/images/..", "has '..' in it", id="parent at the end"),
        pytest.param("/images//disk.raw", "has an empty name or '.' in it", id="empty name"),
        pytest.param("/images/./disk.raw", "has an empty name or '.' in it", id="dot"),
        pytest.param("/images/disk.raw/", "has an empty name or '.' in it", id="slash at the end"),
        pytest.param("/images/a\0b", "has a NUL in it", id="NUL"),
        pytest.param("json:{}", "is not absolute", id="json"),
        pytest.param("nbd://localhost/", "is not absolute", id="protocol"),
    ],
)
def test_path_is_refused_if_it_is(
    alice: Agent, valid: Request, field: str, path: str, problem: str
) -> None:
    """By its text alone, whatever exists."""
    (valid.source if field == "source.path" else valid.dest).path = path
    refusal = alice.convert(valid).refusal()
    metadata = {"field": field, "path": path, "problem": problem}
    assert (refusal.status, refusal.reason) == ("INVALID_ARGUMENT", "BAD_PATH")
    assert refusal.metadata == metadata
    assert refusal.fields == (field,)
    assert field in refusal.message
    assert problem in refusal.message


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        pytest.param("/" + "a/" * 2047 + "ab", "is longer than 4095 bytes", id="4096 bytes"),
        pytest.param("/" + "a" * 256, "has a name longer than 255 bytes", id="a name of 256"),
        pytest.param("/" + "ä" * 128, "has a name longer than 255 bytes", id="256, of 128 letters"),
    ],
)
def test_path_that_is_too_long_is_refused_and_shortened_in_the_reply(
    alice: Agent, source: Path, path: str, problem: str
) -> None:
    """And is not repeated in full: an answer's metadata has little room."""
    refusal = alice.convert(conversion(source, path)).refusal()
    assert (refusal.status, refusal.reason) == ("INVALID_ARGUMENT", "BAD_PATH")
    assert refusal.metadata["problem"] == problem
    assert len(refusal.metadata["path"]) <= 257


def is_set(**values: Any) -> Change:  # noqa: ANN401 - the messages check their fields
    """A change of a request: of its own fields, or of its `source__` or `dest__` ones."""

    def change(request: Request) -> None:
        for name, value in values.items():
            *where, field = name.split("__")
            setattr(getattr(request, where[0]) if where else request, field, value)

    return change


def with_options(options: pb.VdiOptions) -> Change:
    """Options of another format."""
    return lambda request: request.dest.vdi.CopyFrom(options)


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        pytest.param(is_set(source__format="qcow3"), "BAD_FORMAT", "source.format", id="source"),
        pytest.param(is_set(dest__format="iso"), "BAD_FORMAT", "dest.format", id="dest"),
        pytest.param(is_set(dest__format=""), "BAD_FORMAT", "dest.format", id="no dest"),
        pytest.param(is_set(dest__format="dmg"), "BAD_FORMAT", "dest.format", id="read-only"),
        pytest.param(is_set(dest__format="host_device"), "BAD_FORMAT", "dest.format", id="driver"),
        pytest.param(is_set(cache_mode=99), "BAD_OPTION", "cache_mode", id="cache mode"),
        pytest.param(
            is_set(dest__compression=99), "BAD_OPTION", "dest.compression", id="compression"
        ),
        pytest.param(
            is_set(dest__preallocation=99), "BAD_OPTION", "dest.preallocation", id="preallocation"
        ),
        pytest.param(is_set(dest__mode=0o777), "BAD_OPTION", "dest.mode", id="executable"),
        pytest.param(is_set(dest__mode=0o4600), "BAD_OPTION", "dest.mode", id="setuid"),
        pytest.param(is_set(dest__mode=2**32 - 1), "BAD_OPTION", "dest.mode", id="all bits"),
        pytest.param(is_set(dest__group="1234:0"), "BAD_OPTION", "dest.group", id="no group"),
        pytest.param(is_set(dest__group="root"), "BAD_OPTION", "dest.group", id="another's group"),
        pytest.param(
            is_set(dest__group="no-such-group"), "BAD_OPTION", "dest.group", id="missing group"
        ),
        pytest.param(
            is_set(rate_limit_bytes_per_second=MIB - 1),
            "BAD_OPTION",
            "rate_limit_bytes_per_second",
            id="rate",
        ),
        pytest.param(
            is_set(rate_limit_bytes_per_second=2**64 - 1),
            "BAD_OPTION",
            "rate_limit_bytes_per_second",
            id="a rate beyond qemu",
        ),
        pytest.param(is_set(label="x" * 129), "BAD_OPTION", "label", id="long label"),
        pytest.param(is_set(label="a\nb"), "BAD_OPTION", "label", id="label of two lines"),
        pytest.param(
            is_set(dest__format="raw", dest__compression=pb.COMPRESSION_ZLIB),
            "BAD_OPTION",
            "dest.compression",
            id="compressed raw",
        ),
        pytest.param(
            is_set(
                dest__compression=pb.COMPRESSION_ZLIB, dest__preallocation=pb.PREALLOCATION_FULL
            ),
            "BAD_OPTION",
            "dest.compression",
            id="compressed and preallocated",
        ),
        pytest.param(
            is_set(dest__format="vmdk", dest__preallocation=pb.PREALLOCATION_FULL),
            "BAD_OPTION",
            "dest.preallocation",
            id="preallocated vmdk",
        ),
        pytest.param(
            is_set(dest__format="raw", dest__preallocation=pb.PREALLOCATION_METADATA),
            "BAD_OPTION",
            "dest.preallocation",
            id="metadata of raw",
        ),
        pytest.param(with_options(pb.VdiOptions()), "BAD_OPTION", "dest.vdi", id="other's options"),
        pytest.param(is_set(dest__is_zero=True), "BAD_OPTION", "dest.is_zero", id="zero file"),
        pytest.param(
            is_set(source__format="luks"), "BAD_OPTION", "source.encryption", id="no passphrase"
        ),
        pytest.param(
            is_set(dest__format="luks"), "BAD_OPTION", "dest.encryption", id="none for dest"
        ),
    ],
)
def test_option_with_an_invalid_value_is_refused_with_its_field(
    alice: Agent, valid: Request, change: Change, reason: str, field: str
) -> None:
    """The field is named, for programs and for people."""
    change(valid)
    refusal = alice.convert(valid).refusal()
    assert (refusal.status, refusal.reason) == ("INVALID_ARGUMENT", reason)
    assert refusal.fields == (field,)
    assert refusal.metadata["field"] == field
    assert all(value in refusal.message for value in refusal.metadata.values())


def test_destination_that_is_the_source_is_refused(alice: Agent, images_dir: Path) -> None:
    """It would have to be overwritten while it is read."""
    path = images.small(images_dir / "disk.raw")
    refusal = alice.convert(conversion(path, path, overwrite=True)).refusal()
    check_fields = {"field": "dest.path", "path": str(path), "problem": "is the source"}
    assert refusal.metadata == check_fields


def test_destination_with_a_reserved_temporary_name_is_refused(
    alice: Agent, source: Path, images_dir: Path
) -> None:
    """It could be swept away."""
    refusal = alice.convert(conversion(source, images_dir / ".convertd-mine")).refusal()
    assert (refusal.reason, refusal.fields) == ("BAD_PATH", ("dest.path",))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xff\xff\xff", id="a cut varint"),
        pytest.param(b"\x0a\x7f\x0a", id="a cut message"),
        pytest.param(b"\x0a\x04\x0a\x02\xc3\x28", id="a path that is no UTF-8"),
    ],
)
def test_invalid_request_bytes_are_refused_by(alice: Agent, method: str, data: bytes) -> None:
    """With a reason, where gRPC would say UNKNOWN. A field that a message lacks is no mistake."""
    first = METHODS[method].input_type.fields_by_number.get(1)
    if first is not None and first.type == first.TYPE_STRING:
        data = data.removeprefix(b"\x0a\x04")
    elif (first is None or first.message_type is None) and data.startswith(b"\x0a\x04"):
        data = b"\x0a\x05\x0a\x02\xc3\x28"
    refusal = alice.call(method, data).refusal()
    assert (refusal.status, refusal.reason) == ("INVALID_ARGUMENT", "BAD_MESSAGE")
    assert refusal.fields == ("",)


def test_unknown_request_fields_are_ignored(alice: Agent, source: Path, images_dir: Path) -> None:
    """A newer client's."""
    request = conversion(source, images_dir / "dest.qcow2", validate_only=True)
    data = request.SerializeToString() + b"\xf2\x3f\x03abc"
    assert alice.call("Convert", data).end().status == "OK"


def test_oversized_request_is_refused_by_the_transport(alice: Agent) -> None:
    """Before anything is parsed: so there is no ErrorInfo."""
    ended = alice.call("Convert", b"\x0a" + b"\x00" * 300_000).end()
    assert (ended.status, ended.details) == ("RESOURCE_EXHAUSTED", ())


def test_counters_are_refused_to_users_who_are_not_operators(daemon: Daemon, alice: Agent) -> None:
    """They tell what others do."""
    refusal = alice.call("GetStats", pb.GetStatsRequest()).refusal()
    assert (refusal.status, refusal.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    stats = daemon.agent(ROOT).ask("GetStats", pb.GetStatsRequest(), pb.GetStatsResponse)
    assert stats.connections >= 2


def test_result_of_several_files_is_refused(alice: Agent, source: Path, images_dir: Path) -> None:
    """qemu-img would name the others by itself."""
    request = conversion(source, images_dir / "dest.qcow2", dest_format="vmdk")
    request.dest.vmdk.subformat = pb.VMDK_SUBFORMAT_MONOLITHIC_FLAT
    refusal = alice.convert(request).refusal()
    assert (refusal.status, refusal.reason) == ("UNIMPLEMENTED", "UNSUPPORTED")


# --- who may: UNAUTHENTICATED, PERMISSION_DENIED ------------------------------------------------


def test_connection_that_bypassed_the_broker_is_refused(daemon: Daemon) -> None:
    """Only root and the front can reach gRPC's own socket, and it doesn't help them."""
    with contextlib.closing(Agent(ROOT, daemon.private / "grpc.sock", daemon.log_path)) as agent:
        for method in METHODS:
            refusal = agent.call(method, b"").refusal()
            check(refusal, "UNAUTHENTICATED", "UNKNOWN_CONNECTION")


def test_internal_socket_is_reachable_by_root_and_the_front_only(daemon: Daemon) -> None:
    """Its directory is the front's alone."""
    status = daemon.private.stat()
    assert stat.S_IMODE(status.st_mode) == 0o700
    script = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    ran = ALICE.run(["/usr/bin/python3", "-c", script, str(daemon.private / "grpc.sock")])
    assert "PermissionError" in ran.err


@pytest.mark.parametrize("exists", [True, False], ids=["that exists", "that does not exist"])
def test_unlisted_user_is_refused_a_conversion(
    daemon: Daemon, source: Path, images_dir: Path, *, exists: bool
) -> None:
    """Which answers say is no more than what was asked."""
    path = source if exists else source.with_name("smell.raw")
    dest = images_dir / "dest.qcow2"
    refusal = daemon.agent(MALLORY).convert(conversion(path, dest)).refusal()
    action = f"convert '{path}' (raw) to '{dest}' (qcow2)"
    check(refusal, "PERMISSION_DENIED", "PERMISSION_DENIED", uid="1666", action=action)
    inspect = pb.InspectRequest(source=pb.Source(path=str(path)))
    refusal = daemon.agent(MALLORY).call("Inspect", inspect).refusal()
    action = f"inspect '{path}'"
    check(refusal, "PERMISSION_DENIED", "PERMISSION_DENIED", uid="1666", action=action)


def test_unlisted_user_sees_no_job_and_no_grant(daemon: Daemon) -> None:
    """No job, no grant, nobody's job to cancel."""
    agent = daemon.agent(MALLORY)
    assert agent.jobs() == []
    access = agent.access()
    assert (access.uid, access.gid, list(access.groups)) == (1666, 1666, [])
    assert (access.is_operator, list(access.grants)) == (False, [])
    refusal = agent.call("CancelJob", pb.CancelJobRequest(job_id="0123456789ab")).refusal()
    check(refusal, "NOT_FOUND", "JOB_NOT_FOUND", job_id="0123456789ab")


def test_root_user_has_only_the_rights_of_the_policy(
    daemon: Daemon, source: Path, images_dir: Path
) -> None:
    """An operator sees and cancels; it has no right to convert."""
    refusal = daemon.agent(ROOT).convert(conversion(source, images_dir / "dest.qcow2")).refusal()
    assert (refusal.status, refusal.metadata["uid"]) == ("PERMISSION_DENIED", "0")


def test_get_access_lists_the_grants_of_the_caller(daemon: Daemon, scratch: Path) -> None:
    """As the kernel names it, with the groups it connected with."""
    access = daemon.agent(ALICE).access()
    assert (access.uid, access.gid, list(access.groups)) == (1234, 1234, [1300, 1400])
    assert [grant.rule for grant in access.grants] == ["grants[0]", "grants[1]"]
    roots = {root.name: root for root in access.grants[1].roots}
    assert roots["outbox"].path == f"{scratch}/outbox"
    assert (roots["outbox"].may_read, roots["outbox"].may_write) == (False, True)
    assert access.limits.virtual_size_bytes == 64 * MIB


def denied(alice: Agent, request: Request) -> tuple[str, ...]:
    """The refusal of a request, without its paths."""
    refusal = alice.convert(request).refusal()
    assert (refusal.status, refusal.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    action = f"convert '{request.source.path}' (raw) to '{request.dest.path}'"
    assert refusal.metadata["action"].startswith(action)
    return tuple(sorted(refusal.metadata))


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        pytest.param("/etc/shadow", "/etc/shodow", id="outside of all roots"),
        pytest.param("/etc/ssl", "/etc/no-such", id="a directory outside"),
        pytest.param("{scratch}/outbox/there", "{scratch}/outbox/missing", id="another root"),
        pytest.param(
            "{scratch}/images/inner/there",
            "{scratch}/images/inner/missing",
            id="a root in one's root",
        ),
        pytest.param("{scratch}/images", "{scratch}/image", id="the root itself"),
        pytest.param(
            "{scratch}/images2/there", "{scratch}/images2/gone", id="a name that begins so"
        ),
    ],
)
def test_refusal_does_not_reveal_whether_a_source_exists(
    alice: Agent, scratch: Path, images_dir: Path, there: str, missing: str
) -> None:
    """Where the caller has no right to know."""
    paths = [Path(path.replace("{scratch}", str(scratch))) for path in (there, missing)]
    (scratch / "images2").mkdir(exist_ok=True)
    if not paths[0].exists():
        paths[0].write_bytes(b"secret")
    assert not paths[1].exists()
    answers = {denied(alice, conversion(path, images_dir / "dest.qcow2")) for path in paths}
    assert len(answers) == 1


def test_refusal_does_not_reveal_whether_a_destination_exists(
    alice: Agent, source: Path, scratch: Path
) -> None:
    """Or its directory."""
    inner = scratch / "images" / "inner"
    (inner / "exists").write_bytes(b"secret")
    paths = (inner / "exists", inner / "missing", inner / "no" / "directory", Path("/etc/shadow"))
    answers = {denied(alice, conversion(source, path, overwrite=True)) for path in paths}
    assert len(answers) == 1


def test_rights_of_two_grants_are_never_combined(alice: Agent, source: Path, scratch: Path) -> None:
    """The one reads where the other may not write, in a format that the other may not."""
    own = images.small(scratch / "images" / "own.raw")
    denied(alice, conversion(own, scratch / "outbox" / "dest.raw", dest_format="raw"))
    denied(alice, conversion(source, scratch / "outbox" / "dest.qcow2"))
    dest = scratch / "outbox" / "dest.raw"
    assert alice.convert(conversion(source, dest, dest_format="raw")).result().published


def test_detected_format_is_checked_against_the_policy(
    alice: Agent, library: Path, images_dir: Path
) -> None:
    """The caller left it open, so that it could not be judged before."""
    source = images.converted(library / "small.raw", images_dir / "source", "vdi")
    request = conversion(source, images_dir / "dest.qcow2", source_format="")
    refusal = alice.convert(request).refusal()
    check(refusal, "PERMISSION_DENIED", "FORMAT_NOT_ALLOWED", path=str(source), format="vdi")
    request.source.format = "vdi"
    assert alice.convert(request).refusal().reason == "PERMISSION_DENIED"


# --- what is not there: NOT_FOUND, ALREADY_EXISTS -----------------------------------------------


@pytest.mark.parametrize("name", ["missing.raw", "no/such/directory.raw", "file/below.raw"])
def test_missing_source_is_reported_in_a_readable_root(
    alice: Agent, images_dir: Path, name: str
) -> None:
    """In a root that one may read."""
    (images_dir / "file").touch()
    call = alice.convert(conversion(images_dir / name, images_dir / "dest.qcow2"))
    check(call.refusal(), "NOT_FOUND", "SOURCE_NOT_FOUND", path=str(images_dir / name))


@pytest.mark.parametrize("name", ["no/dest.qcow2", "file/dest.qcow2"])
def test_missing_destination_directory_is_reported(
    alice: Agent, source: Path, images_dir: Path, name: str
) -> None:
    """Directories are not made."""
    (images_dir / "file").touch()
    dest = images_dir / name
    call = alice.convert(conversion(source, dest))
    check(call.refusal(), "NOT_FOUND", "DIRECTORY_NOT_FOUND", path=str(dest.parent))


def test_missing_root_is_reported(
    alice: Agent, source: Path, scratch: Path, images_dir: Path
) -> None:
    """Each job resolves its roots anew."""
    gone = scratch / "gone"
    gone.rmdir()
    try:
        call = alice.convert(conversion(gone / "disk.raw", images_dir / "dest.qcow2"))
        check(call.refusal(), "NOT_FOUND", "SOURCE_NOT_FOUND", path=str(gone / "disk.raw"))
        call = alice.convert(conversion(source, gone / "dest.qcow2"))
        check(call.refusal(), "NOT_FOUND", "DIRECTORY_NOT_FOUND", path=str(gone))
    finally:
        gone.mkdir()


def test_root_replaced_by_a_symlink_is_not_followed(
    alice: Agent, source: Path, scratch: Path, images_dir: Path
) -> None:
    """Whoever swaps a root for a link chooses what is read."""
    linked = scratch / "linked"
    linked.rmdir()
    linked.symlink_to("/etc")
    try:
        call = alice.convert(conversion(linked / "shadow", images_dir / "dest.qcow2"))
        path = str(linked / "shadow")
        check(call.refusal(), "FAILED_PRECONDITION", "SYMLINK_IN_PATH", path=path)
        call = alice.convert(conversion(source, linked / "dest.qcow2"))
        assert call.refusal().reason == "SYMLINK_IN_PATH"
    finally:
        linked.unlink()
        linked.mkdir()


def test_existing_destination_is_refused_and_unchanged(
    alice: Agent, source: Path, images_dir: Path
) -> None:
    """And is as it was."""
    dest = images_dir / "there.qcow2"
    dest.write_bytes(b"as it was")
    check(
        alice.convert(conversion(source, dest)).refusal(),
        "ALREADY_EXISTS",
        "DEST_EXISTS",
        path=str(dest),
    )
    assert dest.read_bytes() == b"as it was"


# --- what stands in the way: FAILED_PRECONDITION ------------------------------------------------


@pytest.mark.parametrize(
    "link",
    [
        pytest.param(("link", "real/disk.raw"), id="to a file of the root"),
        pytest.param(("link", "/etc/shadow"), id="out of the root"),
        pytest.param(("link", "nowhere"), id="to nowhere"),
        pytest.param(("link", "link"), id="to itself"),
        pytest.param(("link/disk.raw", "real"), id="on the way"),
        pytest.param(("link/passwd", "/etc"), id="on the way out"),
        pytest.param(("link/disk.raw", "../no-such"), id="on the way to nowhere"),
    ],
)
@pytest.mark.parametrize("end", ["source", "dest"])
def test_symlink_is_not_followed(
    alice: Agent, source: Path, images_dir: Path, link: tuple[str, str], end: str
) -> None:
    """Neither to a source nor to a destination, wherever it leads."""
    name, target = link
    (images_dir / "real").mkdir()
    images.small(images_dir / "real" / "disk.raw")
    (images_dir / "link").symlink_to(target)
    path = images_dir / name
    request = {
        "source": conversion(path, images_dir / "dest.qcow2"),
        "dest": conversion(source, path, overwrite=True),
    }[end]
    check(
        alice.convert(request).refusal(),
        "FAILED_PRECONDITION",
        "SYMLINK_IN_PATH",
        path=str(path),
    )
    assert (images_dir / "link").is_symlink()


def a_fifo(path: Path) -> None:
    """Opening it would wait for its other end."""
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    """Nobody listens."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def a_directory(path: Path) -> None:
    """An empty one."""
    path.mkdir()


def a_character_device(path: Path) -> None:
    """/dev/zero has no end."""
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))


def a_block_device(path: Path) -> None:
    """In a root of files it is none."""
    os.mknod(path, 0o666 | stat.S_IFBLK, os.makedev(7, 0))


@pytest.mark.parametrize(
    "make",
    [a_fifo, a_socket, a_directory, a_character_device, a_block_device],
    ids=lambda make: make.__name__,
)
@pytest.mark.parametrize("end", ["source", "dest"])
def test_object_that_is_not_an_image_is_refused(
    alice: Agent, source: Path, images_dir: Path, make: Callable[[Path], None], end: str
) -> None:
    """The answer says what it is; it comes at once, and what was there is left alone."""
    path = images_dir / "thing"
    make(path)
    before = path.lstat()
    request = {
        "source": conversion(path, images_dir / "dest.qcow2"),
        "dest": conversion(source, path, overwrite=True),
    }[end]
    found = make.__name__.replace("_", " ").replace("fifo", "FIFO")
    check(
        alice.convert(request).refusal(),
        "FAILED_PRECONDITION",
        "NOT_AN_IMAGE",
        path=str(path),
        found=found,
        wanted="a regular file",
    )
    assert path.lstat() == before


def test_mount_inside_a_root_is_not_entered(
    alice: Agent, source: Path, images_dir: Path, mounts: Mounts
) -> None:
    """What is mounted there may be anybody's; FUSE could hold a job for ever."""
    with Mounts(images_dir) as inside:
        other = inside.in_memory("tmpfs", "mounted")
        images.small(other / "disk.raw")
        root = str(images_dir.parent)
        for path, request in (
            (other / "disk.raw", conversion(other / "disk.raw", images_dir / "dest.qcow2")),
            (other / "dest.qcow2", conversion(source, other / "dest.qcow2")),
        ):
            check(
                alice.convert(request).refusal(),
                "FAILED_PRECONDITION",
                "OUTSIDE_ROOT",
                path=str(path),
                root=root,
            )
        assert os.listdir(other) == ["disk.raw"]
    assert mounts is not None


def test_image_of_another_format_than_stated_is_refused(
    alice: Agent, source: Path, images_dir: Path
) -> None:
    """Nothing is probed that was stated."""
    call = alice.convert(conversion(source, images_dir / "dest.qcow2", source_format="qcow2"))
    check(
        call.refusal(),
        "FAILED_PRECONDITION",
        "FORMAT_MISMATCH",
        path=str(source),
        format="qcow2",
    )


def test_image_with_two_possible_formats_is_refused(alice: Agent, images_dir: Path) -> None:
    """With what it looks like, and what to do."""
    source = images_dir / "source"
    source.write_bytes(gzip.compress(bytes(8192)))
    check(
        alice.convert(conversion(source, images_dir / "dest.qcow2", source_format="")).refusal(),
        "FAILED_PRECONDITION",
        "AMBIGUOUS_FORMAT",
        path=str(source),
        found="gzip data",
        remedy="unpack it (gzip -dc IMAGE > DISK), or, if it is a disk as it is, "
        "state its format: raw",
    )


def test_image_of_a_format_not_allowed_by_the_policy_is_not_opened(
    alice: Agent, images_dir: Path
) -> None:
    """That it could not be opened is not told, for nobody tried."""
    source = images_dir / "source"
    source.write_bytes(b"QED\0".ljust(512, b"\xff"))
    check(
        alice.convert(conversion(source, images_dir / "dest.qcow2", source_format="")).refusal(),
        "PERMISSION_DENIED",
        "FORMAT_NOT_ALLOWED",
        path=str(source),
        format="qed",
    )


@pytest.mark.parametrize("image_format", ["qcow2", "vmdk"])
@pytest.mark.parametrize("content", [b"", b"QFI\xfb\0\0\0\3", b"KDMV" + b"\xff" * 508])
def test_file_that_is_not_an_image_is_refused(
    alice: Agent, images_dir: Path, image_format: str, content: bytes
) -> None:
    """Empty, or no more than a few bytes of a header."""
    source = images_dir / "source"
    source.write_bytes(content)
    request = conversion(source, images_dir / "dest.qcow2", source_format=image_format)
    refusal = alice.convert(request).refusal()
    assert refusal.status == "FAILED_PRECONDITION"
    assert refusal.reason in {"IMAGE_REFUSED", "FORMAT_MISMATCH"}
    assert refusal.metadata["path"] == str(source)


def test_image_with_a_virtual_size_over_the_limit_is_refused(
    alice: Agent, images_dir: Path
) -> None:
    """The policy says how large; a few bytes of header say any size."""
    source = images.created(images_dir / "source.qcow2", "qcow2", 65)
    request = conversion(source, images_dir / "dest.qcow2", source_format="qcow2")
    check(
        alice.convert(request).refusal(),
        "FAILED_PRECONDITION",
        "IMAGE_TOO_LARGE",
        path=str(source),
        size_bytes=str(65 * MIB),
        limit_bytes=str(64 * MIB),
    )


def test_image_marked_corrupt_is_refused(alice: Agent, images_dir: Path) -> None:
    """By whom it broke under: what it holds is anybody's guess."""
    source = images.created(images_dir / "source.qcow2", "qcow2", 4)
    with source.open("r+b") as file:
        # Bit 1 of the incompatible features. Source: qemu docs/interop/qcow2.txt.
        file.seek(79)
        file.write(b"\x02")
    request = conversion(source, images_dir / "dest.qcow2", source_format="qcow2")
    refusal = alice.convert(request).refusal()
    assert (refusal.status, refusal.reason) == ("FAILED_PRECONDITION", "IMAGE_DAMAGED")


@contextlib.contextmanager
def used_by_qemu(path: Path, image_format: str) -> Iterator[None]:
    """A real qemu that has an image open for writing, as a running guest's has."""
    argv = ["qemu-io", "-f", image_format, str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"write -P 1 0 512\n")
        process.stdin.flush()
        while b"wrote 512/512" not in process.stdout.readline():
            assert process.poll() is None
        yield
        process.stdin.write(b"quit\n")
        process.stdin.close()


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_source_that_qemu_has_open_for_writing_is_refused(
    alice: Agent, images_dir: Path, image_format: str
) -> None:
    """What would be read is no state that the disk ever was in."""
    source = images.created(images_dir / "source", image_format, 4)
    request = conversion(source, images_dir / "dest.qcow2", source_format=image_format)
    with used_by_qemu(source, image_format):
        check(
            alice.convert(request).refusal(),
            "FAILED_PRECONDITION",
            "IMAGE_IN_USE",
            path=str(source),
        )
    assert alice.convert(request).result().published
    (images_dir / "dest.qcow2").unlink()


def test_disk_of_a_running_qemu_is_not_overwritten(
    alice: Agent, source: Path, images_dir: Path
) -> None:
    """It would go on writing into a file without a name."""
    dest = images.created(images_dir / "there.raw", "raw", 4)
    os.chown(dest, ALICE.uid, ALICE.gid)
    before = dest.stat().st_ino
    request = conversion(source, dest, dest_format="raw", overwrite=True)
    with used_by_qemu(dest, "raw"):
        refusal = alice.convert(request).refusal()
        check(refusal, "FAILED_PRECONDITION", "IMAGE_IN_USE", path=str(dest))
    assert dest.stat().st_ino == before
    assert alice.convert(request).result().replaced


@contextlib.contextmanager
def signals_ignored(number: signal.Signals) -> Iterator[None]:
    """A lease's holder is sent SIGIO when somebody wants the file, and would end of it."""
    before = signal.signal(number, signal.SIG_IGN)
    yield
    signal.signal(number, before)


def test_file_with_a_lease_is_refused_without_waiting(alice: Agent, images_dir: Path) -> None:
    """open(2) would wait 45 seconds for its holder. Source: fcntl(2)."""
    source = images.small(images_dir / "source.raw")
    with source.open("r+b") as held, signals_ignored(signal.SIGIO):
        fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        request = conversion(source, images_dir / "dest.qcow2")
        refusal = alice.convert(request).refusal()
        check(refusal, "FAILED_PRECONDITION", "IMAGE_IN_USE", path=str(source))


# --- images that name other files ---------------------------------------------------------------


def with_backing_file(path: Path, named: str) -> None:
    """An overlay."""
    argv = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", named]
    subprocess.run([*argv, str(path), "4M"], check=True)


def with_data_file(path: Path, named: str) -> None:
    """A qcow2 whose data is elsewhere."""
    placeholder = path.with_name("d" * len(named))
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={placeholder.name}"]
    subprocess.run([*argv, path.name, "4M"], check=True, cwd=path.parent)
    placeholder.unlink()
    content = path.read_bytes()
    assert content.count(placeholder.name.encode()) == 1
    path.write_bytes(content.replace(placeholder.name.encode(), named.encode()))


def with_flat_extent(path: Path, named: str) -> None:
    """A vmdk that is nothing but a description."""
    path.write_text(
        f"""# Disk DescriptorFile
version=1
CID=1234abcd
parentCID=ffffffff
createType="monolithicFlat"

RW 8192 FLAT "{named}" 0

ddb.adapterType = "ide"
""",
        encoding="ascii",
    )


@pytest.mark.parametrize(
    ("make", "image_format"),
    [
        pytest.param(with_backing_file, "qcow2", id="as its backing file"),
        pytest.param(with_data_file, "qcow2", id="as its data file"),
        pytest.param(with_flat_extent, "vmdk", id="as its extent"),
    ],
)
@pytest.mark.parametrize("stated", [True, False], ids=["format stated", "format found"])
def test_refusal_does_not_reveal_whether_a_file_named_by_an_image_exists(
    alice: Agent,
    images_dir: Path,
    make: Callable[[Path, str], None],
    image_format: str,
    *,
    stated: bool,
) -> None:
    """An image must be no way to ask which files there are, or to read them."""
    source = images_dir / "source"
    answers = []
    for named in ("/etc/shadow", "/etc/shodow", "/etc/sub/no"):
        make(source, named)
        request = conversion(
            source, images_dir / "dest.qcow2", source_format=image_format if stated else ""
        )
        refusal = alice.convert(request).refusal()
        assert refusal.status in {"FAILED_PRECONDITION", "PERMISSION_DENIED"}
        # qemu-img's own words about opening would tell.
        assert "No such file" not in refusal.message
        assert "Permission denied" not in refusal.message
        answers.append(repr(refusal).replace(named, "NAMED"))
        source.unlink()
    assert len(set(answers)) == 1, answers


@pytest.mark.parametrize(
    "named",
    [
        "nbd://localhost:1/export",
        'json:{"driver":"file","filename":"/etc/shadow"}',
        "fat:/etc",
        "ssh://localhost/etc/shadow",
    ],
    ids=["nbd", "json", "fat", "ssh"],
)
def test_backing_file_name_with_a_protocol_is_refused(
    alice: Agent, images_dir: Path, named: str
) -> None:
    """Qemu would connect, or list a directory."""
    source = images_dir / "source.qcow2"
    with_backing_file(source, named)
    request = conversion(source, images_dir / "dest.qcow2", source_format="qcow2")
    refusal = alice.convert(request).refusal()
    check(
        refusal,
        "FAILED_PRECONDITION",
        "BACKING_REFUSED",
        path=str(source),
        backing=refusal.metadata["backing"],
        problem="it is not the plain name of a file",
    )


def test_backing_file_in_a_root_without_a_grant_is_refused(
    alice: Agent, scratch: Path, images_dir: Path
) -> None:
    """Whether it exists or not: the longest root decides."""
    answers = set()
    for name in ("there.raw", "gone.raw"):
        images.small(scratch / "outbox" / "there.raw")
        source = images_dir / f"over-{name}"
        with_backing_file(source, f"{scratch}/outbox/{name}")
        request = conversion(source, images_dir / "dest.qcow2", source_format="qcow2")
        refusal = alice.convert(request).refusal()
        assert refusal.reason == "BACKING_REFUSED"
        answers.add(refusal.metadata["problem"])
    assert answers == {"it is not below a root that you may read"}


# --- of two who want the same -------------------------------------------------------------------


def test_destination_of_another_job_of_the_same_caller_is_refused(
    daemon: Daemon, alice: Agent, slow: Request, source: Path, images_dir: Path
) -> None:
    """Whoever comes second would only lose what it did. Once the first is gone, it is free."""
    dest = images_dir / "dest.qcow2"
    first = alice.convert(slow)
    first.await_started()
    check(alice.convert(conversion(source, dest)).refusal(), "ABORTED", "DEST_BUSY", path=str(dest))
    first.cancel()
    daemon.await_idle()
    assert alice.convert(conversion(source, dest)).result().published
    dest.unlink()


def test_job_is_cancelled_by_its_caller_in_another_call(
    daemon: Daemon, alice: Agent, slow: Request, images_dir: Path
) -> None:
    """The job list shows it; the answer shows what it was."""
    call = alice.convert(slow)
    job_id = call.await_started().job_id
    (job,) = alice.jobs()
    assert (job.job_id, job.uid, job.state) == (job_id, 1234, pb.JOB_STATE_RUNNING)
    assert job.dest_path == str(images_dir / "dest.qcow2")
    assert alice.cancel_job(job_id).job_id == job_id
    check(call.refusal(), "CANCELLED", "CANCELLED_BY_CALLER")
    daemon.await_idle()
    assert alice.jobs() == []


def test_job_of_another_user_is_neither_listed_nor_cancelled(
    daemon: Daemon, alice: Agent, slow: Request
) -> None:
    """The answer is that of a job that never was."""
    call = alice.convert(slow)
    job_id = call.await_started().job_id
    for caller in (BOB, MALLORY):
        agent = daemon.agent(caller)
        assert agent.jobs() == []
        for asked in (job_id, "0" * len(job_id)):
            refusal = agent.call("CancelJob", pb.CancelJobRequest(job_id=asked)).refusal()
            check(refusal, "NOT_FOUND", "JOB_NOT_FOUND", job_id=asked)
    assert [job.job_id for job in alice.jobs()] == [job_id]
    alice.cancel_job(job_id)
    assert call.refusal().status == "CANCELLED"


def test_operator_lists_and_cancels_every_job(daemon: Daemon, alice: Agent, slow: Request) -> None:
    """Its caller is told by whom: ABORTED, not CANCELLED."""
    call = alice.convert(slow)
    job_id = call.await_started().job_id
    operator = daemon.agent(ROOT)
    assert [job.job_id for job in operator.jobs()] == [job_id]
    operator.cancel_job(job_id)
    check(call.refusal(), "ABORTED", "CANCELLED_BY_OPERATOR")


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_ended_call_cancels_its_job(daemon: Daemon, alice: Agent, slow: Request, how: str) -> None:
    """By cancelling it, or by a deadline that passes."""
    call = alice.convert(slow, timeout_s=10.0 if how == "deadline" else None)
    call.await_started()
    if how == "cancel":
        call.cancel()
    expected = {"cancel": "CANCELLED", "deadline": "DEADLINE_EXCEEDED"}[how]
    assert call.end().status == expected
    daemon.await_idle()
    assert alice.jobs() == []


def test_destination_created_during_the_job_is_not_overwritten(
    daemon: Daemon, alice: Agent, library: Path, images_dir: Path
) -> None:
    """linkat(2) refuses a name that exists: nobody asked to overwrite it."""
    dest = images_dir / "there.qcow2"
    request = conversion(library / "slow.raw", dest, rate_limit_bytes_per_second=MIB)
    call = alice.convert(request)
    with daemon.stopped(QEMU_IMG):
        dest.write_bytes(b"another's")
    check(call.refusal(), "ALREADY_EXISTS", "DEST_EXISTS", path=str(dest))
    assert dest.read_bytes() == b"another's"


def test_destination_replaced_by_another_user_during_the_job_is_not_overwritten(
    daemon: Daemon, alice: Agent, library: Path, images_dir: Path
) -> None:
    """What may be replaced is asked again before it is."""
    dest = images_dir / "there.qcow2"
    dest.write_bytes(b"own")
    os.chown(dest, ALICE.uid, ALICE.gid)
    request = conversion(library / "slow.raw", dest, rate_limit_bytes_per_second=MIB)
    request.dest.overwrite = True
    call = alice.convert(request)
    with daemon.stopped(QEMU_IMG):
        os.chown(dest, BOB.uid, BOB.gid)
    check(call.refusal(), "FAILED_PRECONDITION", "NOT_YOURS", path=str(dest))
    assert dest.read_bytes() == b"own"
    assert os.listdir(images_dir) == ["there.qcow2"]


def test_destination_directory_removed_during_the_job_discards_the_result(
    daemon: Daemon, alice: Agent, library: Path, images_dir: Path
) -> None:
    """There is no place any more to give the result a name in."""
    directory = images_dir / "directory"
    directory.mkdir()
    dest = directory / "dest.qcow2"
    request = conversion(library / "slow.raw", dest, rate_limit_bytes_per_second=MIB)
    call = alice.convert(request)
    with daemon.stopped(QEMU_IMG):
        directory.rmdir()
    refusal = call.refusal()
    assert (refusal.status, refusal.reason) == ("NOT_FOUND", "DIRECTORY_NOT_FOUND")
