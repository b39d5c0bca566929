"""Convert the failure of a gRPC call to a ConvertError, for both clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import grpc
from google.protobuf import message as protobuf
from google.rpc import error_details_pb2, status_pb2

from convertd_client import errors, sockets

DOMAIN: Final = "convertd"
STATUS_KEY: Final = "grpc-status-details-bin"

_NEVER_SENT: Final = "failed to connect to all addresses"
"""The start of gRPC's text for a call that it never sent."""

_OURS: Final[Mapping[str, tuple[str, str]]] = {
    "DEADLINE_EXCEEDED": ("TIMEOUT", "the call took longer than its timeout, and was cancelled"),
    "CANCELLED": ("CALL_CANCELLED", "the call was cancelled"),
    "UNIMPLEMENTED": ("NO_SUCH_METHOD", "this daemon does not know the call"),
    "RESOURCE_EXHAUSTED": ("MESSAGE_TOO_LARGE", "the request or the answer is too large"),
}
"""The meaning of a status that gRPC itself set. Any other is a lost connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a call ended.

    Attributes:
        converting: the call converts, so it matters if its reply was lost.
        answered: the daemon had begun to reply.
        called_off: the client cancelled the call because there was no connection.
    """

    socket: str
    code: grpc.StatusCode
    text: str
    metadata: tuple[tuple[str, str | bytes], ...]
    converting: bool
    answered: bool
    called_off: bool


def error(ending: Ending) -> errors.ConvertError:
    """Choose the error for a call that failed. May connect to the socket, to find the cause."""
    info = _error_info(ending)
    if info is not None:
        return errors.of_status(ending.code.name, info.reason, ending.text, info.metadata)
    if ending.called_off or _was_never_sent(ending):
        return sockets.diagnosis(ending.socket)
    if ending.code is grpc.StatusCode.DEADLINE_EXCEEDED and not ending.answered:
        absent = sockets.diagnosis(ending.socket)
        if absent.reason != "NOT_ANSWERING":
            return absent
    return _transport_error(ending)


def _was_never_sent(ending: Ending) -> bool:
    is_unavailable = ending.code is grpc.StatusCode.UNAVAILABLE
    return is_unavailable and not ending.answered and ending.text.startswith(_NEVER_SENT)


def _transport_error(ending: Ending) -> errors.ConvertError:
    status = ending.code.name
    values = {"grpc_status": status, "grpc_message": ending.text}
    if status in _OURS:
        reason, sentence = _OURS[status]
        return errors.BY_STATUS[status](sentence, reason=reason, metadata=values)
    if ending.converting:
        sentence = "the connection broke: whether the conversion was done is not known"
        return errors.OutcomeUnknown(sentence, reason="CONNECTION_LOST", metadata=values)
    sentence = "the connection to the daemon broke before it answered"
    return errors.Unreachable(sentence, reason="CONNECTION_LOST", metadata=values)


def _error_info(ending: Ending) -> error_details_pb2.ErrorInfo | None:
    """The one ErrorInfo that each error of the daemon has, and gRPC's own errors have not."""
    for key, value in ending.metadata:
        if key == STATUS_KEY and isinstance(value, bytes):
            found = _infos(value)
            return found[0] if len(found) == 1 else None
    return None


def _infos(data: bytes) -> list[error_details_pb2.ErrorInfo]:
    found = []
    try:
        for detail in status_pb2.Status.FromString(data).details:
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info) and info.domain == DOMAIN:
                found.append(info)
    except protobuf.DecodeError:
        return []
    return found
