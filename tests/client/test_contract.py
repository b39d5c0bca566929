"""The client's values are the contract's messages, field by field."""

from __future__ import annotations

import dataclasses
import enum

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from convertd.v1 import convert_pb2 as pb
from convertd_client import (
    conversion,
    results,
    to_proto,
)
from convertd_core import creation_options, proto_mapping

SAME = {
    pb.CacheChoice: results.CacheChoice,
    pb.ConvertProgress: results.Progress,
    pb.ConvertResult: results.ConvertResult,
    pb.GetAccessResponse: results.Access,
    pb.Grant: results.Grant,
    pb.GrantedRoot: results.GrantedRoot,
    pb.ImageMember: results.ImageMember,
    pb.InspectResponse: results.ImageInfo,
    pb.Job: results.Job,
    pb.Limits: results.Limits,
    pb.Plan: results.Plan,
    pb.Snapshot: results.Snapshot,
    pb.Bitmap: results.Bitmap,
    pb.Versions: results.Versions,
    pb.Warning: results.Warning,
}


@pytest.mark.parametrize(("message", "value"), SAME.items(), ids=[kind.__name__ for kind in SAME])
def test_client_value_has_the_fields_of_its_message(message: type[Message], value: type) -> None:
    """A field that the contract gains is one that the client must pass on."""
    own = {item.name for item in dataclasses.fields(value)} - {"plan"}
    assert own == set(message.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize(
    "kind",
    [
        results.CacheMode,
        results.Compression,
        results.JobState,
        results.OverwriteScope,
        results.Phase,
        results.Preallocation,
        results.RootAccess,
        results.RootKind,
    ],
)
def test_client_enum_has_the_values_of_the_contract(kind: type[enum.StrEnum]) -> None:
    """No more and no less."""
    values = pb.DESCRIPTOR.enum_types_by_name[kind.__name__].values
    prefix = values[0].name.removesuffix("UNSPECIFIED")
    assert {item.name for item in kind} == {item.name.removeprefix(prefix) for item in values}


def test_client_format_options_match_the_contract() -> None:
    """By their fields, and each with the values that its field can hold."""
    oneof = pb.Destination.DESCRIPTOR.oneofs_by_name["options"]
    assert {field.name for field in oneof.fields} == set(creation_options.OPTIONS)
    for member in oneof.fields:
        own = {
            creation_options.field_of(name): kind
            for name, kind in creation_options.OPTIONS[member.name].items()
        }
        assert member.message_type is not None
        fields = member.message_type.fields_by_name
        assert set(own) == set(fields)
        for name, kind in own.items():
            assert (kind.known, kind.largest) == kind_of(fields[name], kind.known), name


def kind_of(field: FieldDescriptor, choices: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    """An option's choices and largest number, by its field; a choice keeps qemu's name."""
    if field.enum_type is not None:
        values = [value.name for value in field.enum_type.values]
        prefix = values[0].removesuffix("UNSPECIFIED")
        assert {prefix + creation_options.contract_choice(choice) for choice in choices} == set(
            values[1:]
        )
        return choices, 0
    if field.type == FieldDescriptor.TYPE_BOOL:
        return (), 0
    return (), 2**64 - 1 if field.type == FieldDescriptor.TYPE_UINT64 else 2**32 - 1


def test_each_reply_field_is_read_by_the_client() -> None:
    """Each is set to something that its default is not."""
    told = pb.ConvertResult(
        job_id="1",
        published=True,
        source_format="raw",
        dest_format="qcow2",
        virtual_size_bytes=2,
        allocated_size_bytes=3,
        dest_cache=pb.CacheChoice(mode=pb.CACHE_MODE_NONE, reason="why"),
        source_cache=pb.CacheChoice(mode=pb.CACHE_MODE_WRITEBACK, reason="else"),
        warnings=[pb.Warning(reason="W", message="w")],
        elapsed_seconds=4,
        queued_seconds=5,
        bytes_per_second=6,
        verified=True,
        replaced=True,
        method=pb.METHOD_REFLINK,
        shared_bytes=7,
        written_bytes=8,
    )
    assert len(told.ListFields()) == len(told.DESCRIPTOR.fields)
    assert proto_mapping.from_message(results.ConvertResult, told) == results.ConvertResult(
        job_id="1",
        published=True,
        source_format="raw",
        dest_format="qcow2",
        virtual_size_bytes=2,
        allocated_size_bytes=3,
        dest_cache=results.CacheChoice(mode=results.CacheMode.NONE, reason="why"),
        source_cache=results.CacheChoice(mode=results.CacheMode.WRITEBACK, reason="else"),
        warnings=(results.Warning(reason="W", message="w"),),
        elapsed_seconds=4,
        queued_seconds=5,
        bytes_per_second=6,
        verified=True,
        replaced=True,
        method=results.Method.REFLINK,
        shared_bytes=7,
        written_bytes=8,
    )


def test_client_request_has_each_option() -> None:
    """Every option that the client has."""
    options = conversion.ConvertOptions(
        source_format="raw",
        compression="zstd",
        cache_mode="directsync",
        preallocation="falloc",
        mode=0o640,
        group="disk",
        overwrite=True,
        verify=True,
        rate_limit=1 << 20,
        label="nightly",
        validate_only=True,
        accept_damaged=True,
        reflink="never",
        source_secret=b"one",
        dest_secret=b"two",
    )
    asked = conversion.asked("/a", "/b", "qcow2", options)
    assert to_proto.convert_request(asked) == pb.ConvertRequest(
        source=pb.Source(
            path="/a",
            format="raw",
            encryption=pb.SourceEncryption(passphrase=b"one", format=pb.ENCRYPTION_FORMAT_LUKS),
            accept_damaged=True,
        ),
        dest=pb.Destination(
            path="/b",
            format="qcow2",
            encryption=pb.DestinationEncryption(
                passphrase=b"two",
                format=pb.ENCRYPTION_FORMAT_LUKS,
                cipher_alg="aes-256",
                cipher_mode="xts",
                hash_alg="sha256",
                ivgen_alg="plain64",
                ivgen_hash_alg="sha256",
                iter_time_milliseconds=2000,
            ),
            compression=pb.COMPRESSION_ZSTD,
            preallocation=pb.PREALLOCATION_FALLOC,
            mode=0o640,
            group="disk",
            overwrite=True,
        ),
        cache_mode=pb.CACHE_MODE_DIRECTSYNC,
        verify=True,
        rate_limit_bytes_per_second=1 << 20,
        validate_only=True,
        label="nightly",
        reflink=pb.REFLINK_NEVER,
    )


def test_mode_that_was_not_requested_is_not_sent() -> None:
    """For 0 is a mode."""
    left_out = to_proto.convert_request(conversion.asked("/a", "/b", "raw", {}))
    nothing = to_proto.convert_request(conversion.asked("/a", "/b", "raw", {"mode": 0}))
    assert not left_out.dest.HasField("mode")
    assert nothing.dest.HasField("mode")


@pytest.mark.parametrize("path", ["/run/a b.sock", "/run/50%41.sock", "/run/ä?#.sock"])
def test_socket_path_is_quoted_for_the_grpc_uri(path: str) -> None:
    """Which reads it as a URI."""
    assert "%" in to_proto.target(path)
    assert not set(" ?#") & set(to_proto.target(path))
