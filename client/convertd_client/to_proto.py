"""Between our values and the contract's messages, for both clients. No call is made here."""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable
from typing import Final

from convertd.v1 import convert_pb2 as pb
from convertd_client import (
    errors,
    from_proto,
    results,
)
from convertd_client.conversion import Conversion
from convertd_core import creation_options

CHANNEL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    # A conversion is not repeated by itself, not even one that gRPC thinks never arrived.
    ("grpc.enable_retries", 0),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.enable_http_proxy", 0),
    # The daemon knows callers by their connections: one that another client in this process made,
    # perhaps under another uid, is not ours to use.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    ("grpc.max_metadata_size", 64 * 1024),
    # For a daemon that restarts. Trying to connect costs nothing; gRPC would wait a second first.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 200),
)


def target(path: str) -> str:
    """A socket's path as gRPC's name for it, which is a URI."""
    return "unix:" + urllib.parse.quote(path)


# --- requests ------------------------------------------------------------------------------------


def convert_request(asked: Conversion) -> pb.ConvertRequest:
    """Put a conversion into the contract's words."""
    dest = pb.Destination(
        path=asked.dest,
        format=asked.dest_format,
        compression=pb.Compression.Value(f"COMPRESSION_{asked.compression.name}"),
        preallocation=pb.Preallocation.Value(f"PREALLOCATION_{asked.preallocation.name}"),
        mode=asked.mode,
        group=asked.group,
        overwrite=asked.overwrite,
        is_zero=asked.is_zero,
    )
    _create(dest, asked)
    if asked.dest_secret is not None:
        dest.encryption.passphrase = asked.dest_secret
    source = pb.Source(
        path=asked.source, format=asked.source_format, accept_damaged=asked.accept_damaged
    )
    if asked.source_secret is not None:
        source.encryption.passphrase = asked.source_secret
    return pb.ConvertRequest(
        source=source,
        dest=dest,
        cache_mode=pb.CacheMode.Value(f"CACHE_MODE_{asked.cache_mode.name}"),
        verify=asked.verify,
        rate_limit_bytes_per_second=asked.rate_limit_bytes_per_second,
        validate_only=asked.validate_only,
        label=asked.label,
    )


def _create(dest: pb.Destination, asked: Conversion) -> None:
    """Put the options of dest's format in."""
    for name, value in asked.created:
        options = getattr(dest, asked.dest_format)
        field = options.DESCRIPTOR.fields_by_name[creation_options.field_of(name)]
        if field.enum_type is None:
            setattr(options, field.name, value)
            continue
        values = field.enum_type.values_by_name
        prefix = field.enum_type.values[0].name.removesuffix("UNSPECIFIED")
        setattr(
            options,
            field.name,
            values[prefix + creation_options.contract_choice(str(value))].number,
        )


def inspect_request(path: str, image_format: str) -> pb.InspectRequest:
    """Put a question about an image into the contract's words."""
    return pb.InspectRequest(source=pb.Source(path=path, format=image_format))


# --- answers -------------------------------------------------------------------------------------


class Reading:
    """Reads the events of one conversion, in the order in which they come."""

    def __init__(self, on_progress: Callable[[results.Progress], None] | None) -> None:
        self._on_progress = on_progress
        self._plan: results.Plan | None = None
        self._result: results.ConvertResult | None = None

    def take(self, response: pb.ConvertResponse) -> None:
        """Take the next event. One that this client does not know is skipped."""
        event = response.WhichOneof("event")
        if event == "progress" and self._on_progress is not None:
            self._on_progress(from_proto.progress(response.progress))
        elif event == "started":
            self._plan = from_proto.plan(response.started.plan)
        elif event == "result":
            self._result = from_proto.result(response.result, self._plan)

    def result(self) -> results.ConvertResult:
        """What the stream, which has ended in order, came to.

        Raises:
            errors.OutcomeUnknown: it had no result.
        """
        if self._result is None:
            text = "the daemon ended the call without saying how the conversion ended"
            raise errors.OutcomeUnknown(text, reason="NO_RESULT")
        return self._result
