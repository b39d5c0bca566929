"""Old and new side by side: a client and a daemon of different versions understand each other.

The older side is the descriptor image that is in git, from which nobody may take anything away. The
newer side is made of it: each message gets a field more, and each enum a value more.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from harness import images, waiting
from harness.agent import Agent
from harness.callers import ALICE, PYTHON
from harness.daemon import Daemon
from policies import IMAGES, LIBRARY, Grant, Policy

POLICY: Final = Policy(grants=[Grant(read=[LIBRARY, IMAGES], write=[IMAGES])])

IMAGE: Final = Path(__file__).parents[2] / "proto/convertd-v1.binpb"
PACKAGE: Final = "convertd.v1"
NEW: Final = 1000
"""The number of a field, and of an enum's value, that the older side has never heard of."""


class Version:
    """The messages of one version of the contract."""

    def __init__(self, files: descriptor_pb2.FileDescriptorSet) -> None:
        """As the files describe them."""
        self._pool = descriptor_pool.DescriptorPool()
        for file in files.file:
            self._pool.Add(file)

    def make(self, name: str, **fields: Any) -> Any:  # noqa: ANN401 - made at run time
        """A message of that name."""
        kind = self._pool.FindMessageTypeByName(f"{PACKAGE}.{name}")
        return message_factory.GetMessageClass(kind)(**fields)

    def read(self, name: str, data: bytes) -> Any:  # noqa: ANN401 - made at run time
        """The message that these bytes are."""
        message = self.make(name)
        message.ParseFromString(data)
        return message


def described() -> descriptor_pb2.FileDescriptorSet:
    """What is in git."""
    return descriptor_pb2.FileDescriptorSet.FromString(IMAGE.read_bytes())


@pytest.fixture(scope="module")
def older() -> Version:
    """The contract as it was released."""
    return Version(described())


@pytest.fixture(scope="module")
def newer() -> Version:
    """The contract as it might become."""
    files = described()
    for file in files.file:
        if file.package == PACKAGE:
            for enum in file.enum_type:
                enum.value.add(name=f"{enum.name.upper()}_ADDED", number=NEW)
            for message in file.message_type:
                if not message.options.map_entry:
                    field = message.field.add(name="added", number=NEW)
                    field.type = descriptor_pb2.FieldDescriptorProto.TYPE_STRING
                    field.label = descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL
    return Version(files)


@pytest.fixture
def alice(daemon: Daemon) -> Agent:
    """Sends bytes as uid 1234."""
    return daemon.agent(ALICE)


def request(version: Version, source: Path, dest: Path) -> Any:  # noqa: ANN401 - made at run time
    """A conversion, in the words of a version."""
    return version.make(
        "ConvertRequest",
        source={"path": str(source), "format": "raw"},
        dest={"path": str(dest), "format": "qcow2"},
    )


# --- the daemon is newer, or as new -------------------------------------------------------------


def test_old_client_converts_with_a_new_daemon(
    alice: Agent, older: Version, library: Path, images_dir: Path
) -> None:
    """Every event can be read with the old descriptor, and says what it said."""
    source, dest = library / "small.raw", images_dir / "dest.qcow2"
    call = alice.call("Convert", request(older, source, dest))
    assert call.end().status == "OK"
    events = [older.read("ConvertResponse", data) for data in call.messages]
    assert [event.WhichOneof("event") for event in events[-1:]] == ["result"]
    assert events[-1].result.published
    assert events[-1].result.virtual_size_bytes == images.SMALL_MIB * images.MIB
    assert images.identical(source, dest)


def test_old_client_can_make_all_other_calls(alice: Agent, older: Version, library: Path) -> None:
    """And a job that is not there is an old condition, too."""
    source = {"path": str(library / "small.qcow2")}
    image = reply(alice, older, "Inspect", source=source)
    assert image.format == "qcow2"
    # The process of the Inspect above may still be on its way out.
    waiting.until(lambda: not reply(alice, older, "ListJobs").jobs, "an empty list of jobs")
    assert reply(alice, older, "GetAccess").uid == ALICE.uid
    call = alice.call("CancelJob", older.make("CancelJobRequest", job_id="none"))
    assert (call.refusal().status, call.refusal().reason) == ("NOT_FOUND", "JOB_NOT_FOUND")


def reply(alice: Agent, version: Version, method: str, **fields: Any) -> Any:  # noqa: ANN401
    """The one answer of a call."""
    call = alice.call(method, version.make(f"{method}Request", **fields))
    assert call.end().status == "OK"
    return version.read(f"{method}Response", call.messages[0])


# --- the client is newer ------------------------------------------------------------------------


def test_request_fields_unknown_to_the_daemon_are_ignored(
    alice: Agent, newer: Version, library: Path, images_dir: Path
) -> None:
    """In each message of a request."""
    source, dest = library / "small.raw", images_dir / "dest.qcow2"
    message = request(newer, source, dest)
    message.added = message.source.added = message.dest.added = "what is this?"
    message.dest.qcow2.added = "and this?"
    assert alice.call("Convert", message).end().status == "OK"
    assert images.identical(source, dest)


ENUMS: Final = (
    *("cache_mode", "reflink", "dest.compression", "dest.preallocation", "dest.qcow2.compat"),
    *("dest.encryption.format", "source.encryption.format"),
)
"""Enums of a request."""


@pytest.mark.parametrize("field", ENUMS)
def test_enum_value_unknown_to_the_daemon_is_refused(
    alice: Agent, newer: Version, library: Path, images_dir: Path, field: str
) -> None:
    """To guess what was meant would be to do something else than was asked for."""
    message = request(newer, library / "small.raw", images_dir / "dest.qcow2")
    *way, last = field.split(".")
    inner = message
    for name in way:
        inner = getattr(inner, name)
    setattr(inner, last, NEW)
    refusal = alice.call("Convert", message).refusal()
    assert (refusal.status, refusal.reason) == ("INVALID_ARGUMENT", "BAD_OPTION")
    assert refusal.metadata["field"] == field
    assert list(images_dir.iterdir()) == []


# --- the daemon is newer than this client -------------------------------------------------------

READ: Final = """
import json, sys
from convertd.v1 import convert_pb2 as pb
from convertd_client import results
from convertd_core import proto_mapping
for kind, value, data in json.load(sys.stdin):
    message = getattr(pb, kind).FromString(bytes.fromhex(data))
    print(repr(proto_mapping.from_message(getattr(results, value), message)))
"""

REPLIES: Final = {
    "ConvertProgress": "Progress",
    "Plan": "Plan",
    "ConvertResult": "ConvertResult",
    "InspectResponse": "ImageInfo",
    "Job": "Job",
    "GetAccessResponse": "Access",
}
"""The messages that this client makes values of, and which values."""


def test_reply_with_fields_unknown_to_the_client_is_read(newer: Version) -> None:
    """Each field of each answer set, each enum to a new value, each message with a new field."""
    orders = [
        (kind, reader, filled(newer.make(kind)).SerializeToString().hex())
        for kind, reader in REPLIES.items()
    ]
    argv = [PYTHON, "-I", "-c", READ]
    text = json.dumps(orders)
    done = subprocess.run(argv, check=False, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read = done.stdout.splitlines()
    assert len(read) == len(REPLIES)
    assert not any("what is this?" in line for line in read)
    for line in read:
        assert ("UNSPECIFIED" in line) == ("<" in line), line


def filled(message: Any, depth: int = 0) -> Any:  # noqa: ANN401 - made at run time
    """The message with all of its fields set."""
    for field in fields_of(message):
        if field.message_type is None:
            value = VALUES.get(field.cpp_type, 7)
            if field.name == "added":
                value = "what is this?"
            put(message, field, value)
        elif field.message_type.GetOptions().map_entry:
            getattr(message, field.name)["a"] = "b"
        elif depth < 4:
            inner = getattr(message, field.name)
            filled(inner.add() if field.is_repeated else inner, depth + 1)
    return message


VALUES: Final = {
    FieldDescriptor.CPPTYPE_ENUM: NEW,
    FieldDescriptor.CPPTYPE_STRING: "some text",
    FieldDescriptor.CPPTYPE_BOOL: True,
    FieldDescriptor.CPPTYPE_DOUBLE: 1.5,
}


def put(message: Any, field: FieldDescriptor, value: object) -> None:  # noqa: ANN401
    """Set a scalar, or add it."""
    if field.is_repeated:
        getattr(message, field.name).append(value)
    else:
        setattr(message, field.name, value)


def fields_of(message: Any) -> Iterator[FieldDescriptor]:  # noqa: ANN401 - made at run time
    """The fields of a message, of a oneof but one."""
    seen = set()
    for field in message.DESCRIPTOR.fields:
        group = field.containing_oneof
        if group is None or group.name not in seen:
            yield field
        if group is not None:
            seen.add(group.name)
