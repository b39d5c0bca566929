"""Between our values and the contract's messages, for both clients. No call is made here."""

from __future__ import annotations

import dataclasses
import urllib.parse
from collections.abc import Callable
from typing import Final

from google.protobuf.message import Message

from convertd.v1 import convert_pb2 as pb
from convertd_client import errors, results
from convertd_client.conversion import Conversion
from convertd_core import creation_options, proto_mapping, values

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
    message = pb.ConvertRequest()
    proto_mapping.to_message(asked.request, message)
    for option in asked.request.dest.options:
        _set_option(getattr(message.dest, asked.request.dest.format), option)
    if asked.source_secret is not None:
        message.source.encryption.passphrase = asked.source_secret
    if asked.dest_secret is not None:
        message.dest.encryption.passphrase = asked.dest_secret
    return message


def _set_option(options: Message, option: values.CreationOption) -> None:
    """Put an option of dest's format in, which has the contract's names there."""
    field = options.DESCRIPTOR.fields_by_name[creation_options.field_of(option.name)]
    value: object
    if field.enum_type is not None:
        choice = creation_options.contract_choice(option.value)
        name = proto_mapping.prefix_of(field.enum_type) + choice
        value = field.enum_type.values_by_name[name].number
    elif option.value.isdecimal():
        value = int(option.value)
    else:
        value = option.value == "on"
    setattr(options, field.name, value)


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
            self._on_progress(proto_mapping.from_message(results.Progress, response.progress))
        elif event == "started":
            self._plan = proto_mapping.from_message(results.Plan, response.started.plan)
        elif event == "result":
            done = proto_mapping.from_message(results.ConvertResult, response.result)
            self._result = dataclasses.replace(done, plan=self._plan)

    def result(self) -> results.ConvertResult:
        """What the stream, which has ended in order, came to.

        Raises:
            errors.OutcomeUnknown: it had no result.
        """
        if self._result is None:
            text = "the daemon ended the call without saying how the conversion ended"
            raise errors.OutcomeUnknown(text, reason="NO_RESULT")
        return self._result
