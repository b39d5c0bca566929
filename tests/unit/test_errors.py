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


def test_each_reason_has_the_status_that_outsiders_rely_on() -> None:
    """And there is no reason that is not in the table above."""
    found = {reason: kind.status.value for reason, kind in conditions.BY_REASON.items()}
    assert found == STATUSES


def test_every_status_is_some_conditions() -> None:
    """A status that nothing has is a promise that nothing keeps."""
    assert {kind.status for kind in CONDITIONS} == set(conditions.Status)


def test_an_unknown_reason_counts_as_a_bug() -> None:
    """A front that meets a newer job says INTERNAL, never OK."""
    assert (
        conditions.Failure(reason="NOT_KNOWN_YET", message="").status is conditions.Status.INTERNAL
    )


@pytest.mark.parametrize("kind", CONDITIONS, ids=lambda kind: kind.__name__)
class TestEachCondition:
    """What holds for every one of them."""

    def test_is_one_sentence_in_lower_case(self, kind: type[conditions.ConvertError]) -> None:
        """It begins with a value or a small letter, and has no full stop."""
        assert re.match(r"[a-z{]|qemu-img", kind.sentence)
        assert not kind.sentence.endswith(".")

    def test_has_all_its_values_in_its_sentence(self, kind: type[conditions.ConvertError]) -> None:
        """And its sentence has no value that it has not: both by name."""
        names = set(re.findall(r"\{(\w+)(?:!r)?\}", kind.sentence))
        assert names == set(sample(kind).values())

    def test_is_documented(self, kind: type[conditions.ConvertError]) -> None:
        """In words of its own, not of a dataclass."""
        assert kind.__doc__
        assert not kind.__doc__.startswith(f"{kind.__name__}(")

    def test_passes_between_processes(self, kind: type[conditions.ConvertError]) -> None:
        """With its status, its message and its values."""
        condition = sample(kind)
        failure = codec.decode(codec.encode(condition.failure()), conditions.Failure)
        assert failure.status is kind.status
        assert failure.message == str(condition)
        assert dict(failure.values) == condition.values()

    def test_takes_no_value_by_position(self, kind: type[conditions.ConvertError]) -> None:
        """Two of its texts could be confused."""
        with pytest.raises(TypeError):
            kind("x")


def test_the_tree_in_the_docstring_names_every_status_and_class() -> None:
    """Each branch is a class, and each class that it shows exists."""
    drawn = conditions.__doc__ or ""
    branches = re.findall(r"[├└]── (\w+) +(.*)", drawn)
    for branch, leaves in branches:
        for leaf in leaves.removesuffix(", …").split(", "):
            assert issubclass(getattr(conditions, leaf), getattr(conditions, branch))
    assert {name for name, _ in branches} == {
        kind.__name__ for kind in conditions.ConvertError.__subclasses__()
    }


def test_values_are_put_into_the_sentence_once() -> None:
    """A brace in a path is a brace, not a place for another value."""
    refused = conditions.DeviceTooSmall(path="/{size_bytes}/{0}", size_bytes=1, needed_bytes=2)
    assert str(refused) == "/{size_bytes}/{0}: has 1 bytes, the image needs 2"


@given(st.text(), st.text())
def test_a_text_of_a_caller_that_is_quoted_is_on_one_line(path: str, problem: str) -> None:
    """Nothing that a caller writes begins a line of its own in the journal."""
    refused = conditions.BadPath(field="source.path", path=path, problem="is not absolute")
    assert str(refused).splitlines() == [str(refused)]
    backing = conditions.BackingRefused(path="/a", backing=problem, problem="x")
    assert str(backing).splitlines() == [str(backing)]


@pytest.mark.parametrize("kind", CONDITIONS, ids=lambda kind: kind.__name__)
def test_a_text_that_is_not_unicode_can_be_told_of(kind: type[conditions.ConvertError]) -> None:
    """A front that was taken over gets its answer; it does not stop the broker."""
    failure = sample(kind, text="\ud800").failure()
    assert codec.decode(codec.encode(failure), conditions.Failure) == failure


class TestUndefinedContent:
    """A conversion that had begun to write to a device."""

    def test_is_said_in_message_and_values(self) -> None:
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

    def test_is_not_said_of_what_wrote_nothing(self) -> None:
        """The default: a file just never appears."""
        assert conditions.Stalled(stall_s=1.0).failure().values == (("stall_s", "1.0"),)
