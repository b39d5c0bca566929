"""What a condition becomes on the wire: a status, one ErrorInfo, and never too much of either."""

from __future__ import annotations

import asyncio
import base64
import urllib.parse
from collections.abc import Coroutine
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st

from convertd_core import conditions
from convertd_daemon.front import error_status

CONDITIONS = sorted(conditions.BY_REASON.values(), key=lambda kind: kind.reason)

LONGEST_PATH = "/" + "x" * 4094
METADATA_BYTES = 8 * 1024
"""What clients take of metadata, all in all, before they refuse the reply as a whole."""


def failure_of(kind: type[conditions.ConvertError], text: str = "x") -> conditions.Failure:
    """A condition of that kind, each of its values a text."""
    return kind(**dict.fromkeys(getattr(kind, "__dataclass_fields__", {}), text)).failure()


def details_in(failure: conditions.Failure, kind: type) -> list[any_pb2.Any]:
    """The details of one kind."""
    name = kind.DESCRIPTOR.full_name  # type: ignore[attr-defined]
    found = error_status.details_of(failure).details
    return [detail for detail in found if detail.TypeName() == name]


def wire_bytes(failure: conditions.Failure) -> int:
    """How much metadata a condition takes. Source: gRPC over HTTP/2, Status-Message and -Bin."""
    details = error_status.details_of(failure)
    message = urllib.parse.quote(details.message, safe=" !\"#$&'()*+,/:;<=>?@[\\]^`{|}~")
    return len(message) + len(base64.b64encode(details.SerializeToString()))


@pytest.mark.parametrize("kind", CONDITIONS, ids=lambda kind: kind.__name__)
class TestEachCondition:
    """What holds for every one of them."""

    def test_condition_has_one_error_info_with_all_values(
        self, kind: type[conditions.ConvertError]
    ) -> None:
        """Domain, reason, and what the sentence names."""
        failure = failure_of(kind)
        (detail,) = details_in(failure, error_details_pb2.ErrorInfo)
        info = error_details_pb2.ErrorInfo()
        assert detail.Unpack(info)
        assert (info.domain, info.reason) == ("convertd", kind.reason)
        assert dict(info.metadata) == dict(failure.values)

    def test_condition_has_its_status_and_message(
        self, kind: type[conditions.ConvertError]
    ) -> None:
        """The same in the details as outside of them."""
        found = error_status.details_of(failure_of(kind))
        assert found.code == grpc.StatusCode[kind.status.value].value[0]
        assert found.message == failure_of(kind).message

    def test_condition_has_the_standard_error_details(
        self, kind: type[conditions.ConvertError]
    ) -> None:
        """The field that is wrong, or what stands in the way; of others, nothing."""
        failure = failure_of(kind)
        invalid = details_in(failure, error_details_pb2.BadRequest)
        blocked = details_in(failure, error_details_pb2.PreconditionFailure)
        assert bool(invalid) is (kind.status is conditions.Status.INVALID_ARGUMENT)
        assert bool(blocked) is (kind.status is conditions.Status.FAILED_PRECONDITION)

    def test_condition_ends_the_call(self, kind: type[conditions.ConvertError]) -> None:
        """With status, sentence and details."""

        class Context:
            """As much of a call as it takes to end one."""

            async def abort(self, *ended: Any) -> None:  # noqa: ANN401 - as gRPC has it
                self.ended = ended

        context, failure = Context(), failure_of(kind)
        ending: Coroutine[None, None, None] = error_status.abort(context, failure)  # type: ignore[arg-type]
        asyncio.run(ending)
        code, message, ((key, details),) = context.ended
        assert code is grpc.StatusCode[kind.status.value]
        assert message == failure.message
        assert (key, details) == (
            "grpc-status-details-bin",
            error_status.details_of(failure).SerializeToString(),
        )

    @pytest.mark.parametrize(
        "text",
        [LONGEST_PATH, "/" + "ü" * 2047, "/" + "\N{SNOWMAN}" * 1364, "/" + "\U0001f4be" * 1023],
        ids=["of-one-byte-characters", "of-two", "of-three", "of-four"],
    )
    def test_condition_with_the_longest_path_fits_into_the_metadata(
        self, kind: type[conditions.ConvertError], text: str
    ) -> None:
        """In whatever script: else the client would see no reason at all."""
        assert wire_bytes(failure_of(kind, text)) < METADATA_BYTES


def test_wrong_field_is_named_in_a_bad_request_detail() -> None:
    """In a BadRequest, with the whole sentence."""
    refused = conditions.BadOption(field="dest.mode", problem="has bits outside of 0666")
    (detail,) = details_in(refused.failure(), error_details_pb2.BadRequest)
    request = error_details_pb2.BadRequest()
    detail.Unpack(request)
    (violation,) = request.field_violations
    assert violation.field == "dest.mode"
    assert violation.description == "dest.mode: has bits outside of 0666"


def test_failed_precondition_is_named_in_a_precondition_failure_detail() -> None:
    """In a PreconditionFailure: what kind of thing, and which."""
    refused = conditions.ImageInUse(path="/images/a").failure()
    (detail,) = details_in(refused, error_details_pb2.PreconditionFailure)
    failed = error_details_pb2.PreconditionFailure()
    detail.Unpack(failed)
    (violation,) = failed.violations
    assert (violation.type, violation.subject) == ("IMAGE_IN_USE", "/images/a")


def test_reason_unknown_to_the_front_is_internal() -> None:
    """And keeps its reason and its values."""
    failure = conditions.Failure(reason="NEW", message="new", values=(("a", "b"),))
    assert error_status.details_of(failure).code == grpc.StatusCode.INTERNAL.value[0]
    assert details_in(failure, error_details_pb2.ErrorInfo)


@given(st.text(max_size=600), st.integers(1, 4))
def test_long_text_is_shortened_in_its_middle(text: str, times: int) -> None:
    """Its beginning and its end are what tells it from others."""
    cut = error_status.cut(text, times)
    if cut != text:
        begin, _, end = cut.rpartition("…")
        assert text.startswith(begin)
        assert text.endswith(end)
        assert len(cut) < len(text) or len(cut.encode()) < len(text.encode())
