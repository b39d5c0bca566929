"""The tree of errors is the contract's table, and knows every reason that a daemon gives."""

from __future__ import annotations

import copy
import pickle

import pytest

import convertd_core.conditions
from convertd_client import errors


def test_job_reason_has_the_same_error_class_as_from_a_daemon() -> None:
    """A job says no status: the condition of that reason has one."""
    for reason, kind in convertd_core.conditions.BY_REASON.items():
        error = errors.of_reason(reason, "no", {})
        assert error.status == kind.status
        assert type(error) is type(errors.of_status(kind.status, reason, "no", {}))


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        *((reason, errors.ImageRefused) for reason in ("IMAGE_REFUSED", "IMAGE_DAMAGED")),
        *((reason, errors.ImageRefused) for reason in ("FORMAT_MISMATCH", "AMBIGUOUS_FORMAT")),
        *((reason, errors.ImageRefused) for reason in ("IMAGE_TOO_LARGE", "BACKING_REFUSED")),
        ("QUEUE_FULL", errors.QueueFull),
        ("NO_SPACE", errors.NoSpace),
        ("PUBLISHED_BUT_NOT_DURABLE", errors.PublishedButNotDurable),
        ("WRONG_SECRET", errors.FailedPrecondition),
        ("FORMAT_NOT_ALLOWED", errors.PermissionDenied),
    ],
)
def test_condition_that_callers_act_on_has_its_own_error_class(
    reason: str, kind: type[errors.ConvertError]
) -> None:
    """The others have the class of their status."""
    assert type(errors.of_reason(reason, "no", {})) is kind


def test_each_daemon_status_has_an_error_class() -> None:
    """Which is what a reason goes by that is not known here."""
    assert set(errors.BY_STATUS) == set(convertd_core.conditions.Status)
    assert all(kind.status == status for status, kind in errors.BY_STATUS.items())


@pytest.mark.parametrize(
    ("status", "reason", "kind"),
    [
        ("RESOURCE_EXHAUSTED", "NO_SPACE", errors.NoSpace),
        ("RESOURCE_EXHAUSTED", "OF_A_NEWER_DAEMON", errors.ResourceExhausted),
        ("ABORTED", "NO_SPACE", errors.Aborted),
        ("OUT_OF_RANGE", "OF_A_NEWER_DAEMON", errors.ConvertError),
    ],
)
def test_reason_that_disagrees_with_its_status_gets_the_class_of_the_status(
    status: str, reason: str, kind: type[errors.ConvertError]
) -> None:
    """A class must not promise what another status denies."""
    assert type(errors.of_status(status, reason, "no", {})) is kind


def test_unknown_reason_from_a_local_job_is_a_bug() -> None:
    """A job has no word of statuses."""
    assert type(errors.of_reason("WHATEVER", "no", {})) is errors.Internal


@pytest.mark.parametrize("again", [copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])  # noqa: S301
def test_client_error_can_be_copied_and_pickled(again: object) -> None:
    """As services hand them about."""
    assert callable(again)
    error = errors.NoSpace("full", reason="NO_SPACE", metadata={"free_bytes": "7"})
    twin = again(error)
    assert type(twin) is errors.NoSpace
    assert (str(twin), twin.reason, twin.metadata) == ("full", "NO_SPACE", {"free_bytes": "7"})


def test_unknown_outcome_is_not_caught_as_a_retryable_error() -> None:
    """`except Unavailable: try again` must be safe."""
    assert issubclass(errors.Unreachable, errors.Unavailable)
    assert not issubclass(errors.OutcomeUnknown, errors.Unavailable)
