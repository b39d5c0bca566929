"""Every condition: its reason, its status, its sentence, and its way between processes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convertd_core import codec, conditions

# What outsiders rely on: a reason never changes its status, and none goes away.
STATUSES = {
    "UNKNOWN_CONNECTION": "UNAUTHENTICATED",
    "PERMISSION_DENIED": "PERMISSION_DENIED",
    "FORMAT_NOT_ALLOWED": "PERMISSION_DENIED",
    "CLAIM_NOT_ALLOWED": "PERMISSION_DENIED",
    "BAD_PATH": "INVALID_ARGUMENT",
    "BAD_FORMAT": "INVALID_ARGUMENT",
    "BAD_OPTION": "INVALID_ARGUMENT",
    "BAD_MESSAGE": "INVALID_ARGUMENT",
    "SECRET_MISSING": "INVALID_ARGUMENT",
    "IMAGE_DAMAGED": "FAILED_PRECONDITION",
    "DAMAGE_NOT_ALLOWED": "PERMISSION_DENIED",
    "SIZE_NOT_POSSIBLE": "INVALID_ARGUMENT",
    "SOURCE_NOT_FOUND": "NOT_FOUND",
    "DIRECTORY_NOT_FOUND": "NOT_FOUND",
    "JOB_NOT_FOUND": "NOT_FOUND",
    "DEST_EXISTS": "ALREADY_EXISTS",
    "ACCESS_REFUSED": "FAILED_PRECONDITION",
    "SYMLINK_IN_PATH": "FAILED_PRECONDITION",
    "ROOT_UNUSABLE": "FAILED_PRECONDITION",
    "OUTSIDE_ROOT": "FAILED_PRECONDITION",
    "NOT_AN_IMAGE": "FAILED_PRECONDITION",
    "READ_ONLY_FILE_SYSTEM": "FAILED_PRECONDITION",
    "NOT_YOURS": "FAILED_PRECONDITION",
    "IMAGE_REFUSED": "FAILED_PRECONDITION",
    "FORMAT_MISMATCH": "FAILED_PRECONDITION",
    "AMBIGUOUS_FORMAT": "FAILED_PRECONDITION",
    "BACKING_REFUSED": "FAILED_PRECONDITION",
    "WRONG_SECRET": "FAILED_PRECONDITION",
    "DEVICE_TOO_SMALL": "FAILED_PRECONDITION",
    "DEVICE_NOT_WRITABLE": "FAILED_PRECONDITION",
    "OWNER_NOT_KEPT": "FAILED_PRECONDITION",
    "PROTECTED_BY_ATTRIBUTE": "FAILED_PRECONDITION",
    "NO_DIRECT_WRITES": "FAILED_PRECONDITION",
    "REFLINK_NOT_POSSIBLE": "FAILED_PRECONDITION",
    "IMAGE_TOO_LARGE": "FAILED_PRECONDITION",
    "IMAGE_IN_USE": "FAILED_PRECONDITION",
    "CONVERSION_FAILED": "FAILED_PRECONDITION",
    "QUEUE_FULL": "RESOURCE_EXHAUSTED",
    "TOO_MANY_CALLS": "RESOURCE_EXHAUSTED",
    "NO_SPACE": "RESOURCE_EXHAUSTED",
    "QUOTA_EXCEEDED": "RESOURCE_EXHAUSTED",
    "OUT_OF_MEMORY": "RESOURCE_EXHAUSTED",
    "READ_FAILED": "DATA_LOSS",
    "WRITE_FAILED": "DATA_LOSS",
    "VERIFY_FAILED": "DATA_LOSS",
    "PUBLISHED_BUT_NOT_DURABLE": "DATA_LOSS",
    "DEST_BUSY": "ABORTED",
    "CANCELLED_BY_OPERATOR": "ABORTED",
    "NAME_REPLACED": "ABORTED",
    "SOURCE_CHANGED": "ABORTED",
    "CANCELLED_BY_CALLER": "CANCELLED",
    "STALLED": "DEADLINE_EXCEEDED",
    "DURATION_EXCEEDED": "DEADLINE_EXCEEDED",
    "UNSUPPORTED": "UNIMPLEMENTED",
    "STOPPING": "UNAVAILABLE",
    "INTERNAL_ERROR": "INTERNAL",
}

CONDITIONS = sorted(conditions.BY_REASON.values(), key=lambda kind: kind.reason)


def sample(kind: type[conditions.ConvertError], text: str = "x") -> conditions.ConvertError:
    """A condition of that kind, each of its values a text."""
    names = getattr(kind, "__dataclass_fields__", {})
    return kind(**dict.fromkeys(names, text))


def test_each_reason_has_its_documented_status() -> None:
    """And there is no reason that is not in the table above."""
    found = {reason: kind.status.value for reason, kind in conditions.BY_REASON.items()}
    assert found == STATUSES


def test_each_status_is_used_by_a_condition() -> None:
    """A status that nothing has is a promise that nothing keeps."""
    assert {kind.status for kind in CONDITIONS} == set(conditions.Status)


def test_unknown_reason_is_a_bug() -> None:
    """A front that meets a newer job says INTERNAL, never OK."""
    assert (
        conditions.Failure(reason="NOT_KNOWN_YET", message="").status is conditions.Status.INTERNAL
    )


@pytest.mark.parametrize("kind", CONDITIONS, ids=lambda kind: kind.__name__)
class TestEachCondition:
    """What holds for every one of them."""

    def test_condition_message_is_one_lower_case_sentence(
        self, kind: type[conditions.ConvertError]
    ) -> None:
        """It begins with a value or a small letter, and has no full stop."""
        assert re.match(r"[a-z{]|qemu-img", kind.sentence)
        assert not kind.sentence.endswith(".")

    def test_condition_message_has_all_its_values(
        self, kind: type[conditions.ConvertError]
    ) -> None:
        """And its sentence has no value that it has not: both by name."""
        names = set(re.findall(r"\{(\w+)(?:!r)?\}", kind.sentence))
        assert names == set(sample(kind).values())

    def test_condition_is_documented(self, kind: type[conditions.ConvertError]) -> None:
        """In words of its own, not of a dataclass."""
        assert kind.__doc__
        assert not kind.__doc__.startswith(f"{kind.__name__}(")

    def test_condition_survives_encoding_and_decoding(
        self, kind: type[conditions.ConvertError]
    ) -> None:
        """With its status, its message and its values."""
        condition = sample(kind)
        failure = codec.decode(codec.encode(condition.failure()), conditions.Failure)
        assert failure.status is kind.status
        assert failure.message == str(condition)
        assert dict(failure.values) == condition.values()

    def test_condition_takes_keyword_arguments_only(
        self, kind: type[conditions.ConvertError]
    ) -> None:
        """Two of its texts could be confused."""
        with pytest.raises(TypeError):
            kind("x")


def test_condition_value_with_braces_is_not_formatted_again() -> None:
    """A brace in a path is a brace, not a place for another value."""
    refused = conditions.DeviceTooSmall(path="/{size_bytes}/{0}", size_bytes=1, needed_bytes=2)
    assert str(refused) == "/{size_bytes}/{0}: has 1 bytes, the image needs 2"


@given(st.text(), st.text())
def test_quoted_text_of_a_caller_is_on_one_line(path: str, problem: str) -> None:
    """Nothing that a caller writes begins a line of its own in the journal."""
    refused = conditions.BadPath(field="source.path", path=path, problem="is not absolute")
    assert str(refused).splitlines() == [str(refused)]
    backing = conditions.BackingRefused(path="/a", backing=problem, problem="x")
    assert str(backing).splitlines() == [str(backing)]


@pytest.mark.parametrize("kind", CONDITIONS, ids=lambda kind: kind.__name__)
def test_condition_with_invalid_unicode_can_be_sent(kind: type[conditions.ConvertError]) -> None:
    """A front that was taken over gets its answer; it does not stop the broker."""
    failure = sample(kind, text="\ud800").failure()
    assert codec.decode(codec.encode(failure), conditions.Failure) == failure


class TestUndefinedDeviceContent:
    """A conversion that had begun to write to a device."""

    def test_undefined_content_is_in_the_message_and_the_values(self) -> None:
        """For people and for programs; the reason stays what it is."""
        stalled = conditions.Stalled(stall_s=600.0)
        stalled.undefined_device = "/dev/vg/lv"
        failure = stalled.failure()
        assert failure.reason == "STALLED"
        assert failure.message == (
            "no progress for 600.0 seconds; nothing was published;"
            " the content of /dev/vg/lv is undefined now"
        )
        assert dict(failure.values) == {
            "stall_s": "600.0",
            "device": "/dev/vg/lv",
            "device_content": "undefined",
        }

    def test_undefined_content_is_not_reported_if_nothing_was_written(self) -> None:
        """The default: a file just never appears."""
        assert conditions.Stalled(stall_s=1.0).failure().values == (("stall_s", "1.0"),)
