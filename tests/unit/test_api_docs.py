"""docs/api.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest
from google.protobuf import json_format, message_factory

from convertd.v1 import convert_pb2 as pb
from convertd_core import conditions, values
from convertd_daemon.front import server

PAGE: Final = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")

SERVICE: Final = pb.DESCRIPTOR.services_by_name["ConvertService"]

REFUSALS: Final = re.findall(r"^\| ([A-Z_]+) \| `([A-Z_]+)` \| (.*?) ?\|", PAGE, re.MULTILINE)

EXAMPLES: Final = re.findall(
    r"grpcurl -plaintext -unix -d '([^']*)' \\\n\s+\S+ convertd\.v1\.ConvertService/(\w+)", PAGE
)

KIB: Final = 1024


def rows_after(words: str) -> set[str]:
    """The names in the first cells of the table that follows some words."""
    table = re.search(r"(?:^\|.*\n)+", PAGE.partition(words)[2], re.MULTILINE)
    assert table is not None
    cells = re.findall(r"^\| (`.*?) \|", table[0], re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_api_page_lists_each_refusal_with_status_and_values() -> None:
    """Each once, and none that there is not."""
    listed = [
        (status, reason, set(re.findall(r"`(\w+)`", named))) for status, reason, named in REFUSALS
    ]
    defined = [
        (kind.status.value, reason, set(getattr(kind, "__dataclass_fields__", ())))
        for reason, kind in conditions.BY_REASON.items()
    ]
    assert sorted(listed, key=str) == sorted(defined, key=str)


def test_api_page_lists_each_call() -> None:
    """By its name, with the messages that go and come."""
    table = PAGE.partition("## Calls")[2].partition("\n#")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)`[^|]*\|[^|]*`(\w+)`[^|]*\|", table, re.MULTILINE)
    calls = [(call.name, call.input_type.name, call.output_type.name) for call in SERVICE.methods]
    assert rows == calls


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("### ConvertRequest", pb.ConvertRequest),
        ("A **Source** has", pb.Source),
        ("A **Destination** has", pb.Destination),
    ],
)
def test_api_page_lists_each_request_field(words: str, message: type[pb.Source]) -> None:
    """Of a request; and no other."""
    assert rows_after(words) == set(message.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize(("request_text", "call"), EXAMPLES, ids=[call for _, call in EXAMPLES])
def test_api_page_example_is_a_valid_request(request_text: str, call: str) -> None:
    """As far as can be seen without a daemon."""
    kind = message_factory.GetMessageClass(SERVICE.methods_by_name[call].input_type)
    assert json_format.Parse(request_text, kind()).ListFields()


def test_api_page_has_an_example_for_each_call() -> None:
    """Or the pattern above would no longer find them."""
    asking = {call.name for call in SERVICE.methods if call.input_type.fields}
    assert {call for _, call in EXAMPLES} == asking


def test_api_page_has_the_limits_of_the_server() -> None:
    """In units for people."""
    options = dict(server.OPTIONS)
    limits = values.DEFAULT_LIMITS
    for words in (
        f"| a request | {options['grpc.max_receive_message_length'] // KIB} KiB |",
        f"| a reply | {options['grpc.max_send_message_length'] // KIB // KIB} MiB |",
        f"| a call's metadata | {options['grpc.max_metadata_size'] // KIB} KiB |",
        f"| calls at once on one connection | {options['grpc.max_concurrent_streams']} |",
        f"speaks HTTP/2 | {options['grpc.server_handshake_timeout_ms'] // 1000} s |",
        f"is closed after {options['grpc.max_connection_idle_ms'] // 60_000} min |",
        f"pings after {options['grpc.keepalive_time_ms'] // 1000} s of silence",
        f"and waits {options['grpc.http2.ping_timeout_ms'] // 1000} s |",
        f"| {limits.connections_per_user}, {limits.connections}, unless",
    ):
        assert words in PAGE
