"""Convert a condition to a gRPC status with exactly one ErrorInfo in its details.

Source: https://google.aip.dev/193, google/rpc/error_details.proto.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NoReturn

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from convertd_core import conditions

if TYPE_CHECKING:
    from google.protobuf.message import Message

DOMAIN: Final = "convertd"

DETAILS_KEY: Final = "grpc-status-details-bin"

MAX_VALUE_BYTES: Final = 256
"""Longer values are shortened in the middle: clients refuse metadata of over 8 or 16 KiB in all,
and a byte of the message that is not ASCII is sent as three."""

CODES: Final = {status: grpc.StatusCode[status.value] for status in conditions.Status}


async def abort(context: grpc.aio.ServicerContext, failure: conditions.Failure) -> NoReturn:  # type: ignore[type-arg]
    """End a call with a condition.

    Raises:
        grpc.aio.AbortError: always; gRPC catches it.
    """
    details = details_of(failure).SerializeToString()
    await context.abort(CODES[failure.status], cut(failure.message, 4), ((DETAILS_KEY, details),))


def details_of(failure: conditions.Failure) -> status_pb2.Status:
    """Build the google.rpc.Status of a condition."""
    code: int = CODES[failure.status].value[0]
    status = status_pb2.Status(code=code, message=cut(failure.message, 4))
    metadata = {name: cut(value) for name, value in failure.values}
    info = error_details_pb2.ErrorInfo(reason=failure.reason, domain=DOMAIN, metadata=metadata)
    for detail in (info, *_more(failure, metadata)):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def cut(text: str, times: int = 1) -> str:
    """Shorten a text of more than `times` MAX_VALUE_BYTES in its middle."""
    data, most = text.encode(), MAX_VALUE_BYTES * times
    if len(data) <= most:
        return text
    # errors="ignore" drops the rest of a character that was cut in two.
    begin, end = (part.decode(errors="ignore") for part in (data[: most // 2], data[-most // 2 :]))
    return f"{begin}…{end}"


def _more(failure: conditions.Failure, metadata: dict[str, str]) -> list[Message]:
    """Build the detail beside ErrorInfo that standard tools understand, if one fits."""
    description = cut(failure.message)
    if failure.status is conditions.Status.INVALID_ARGUMENT:
        field = metadata.get("field", "")
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=field, description=description
        )
        return [error_details_pb2.BadRequest(field_violations=[violation])]
    if failure.status is conditions.Status.FAILED_PRECONDITION:
        broken = error_details_pb2.PreconditionFailure.Violation(
            type=failure.reason, subject=metadata.get("path", ""), description=description
        )
        return [error_details_pb2.PreconditionFailure(violations=[broken])]
    return []
