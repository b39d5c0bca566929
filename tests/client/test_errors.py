"""The tree of errors is the contract's table, and knows every reason that a daemon gives."""

from __future__ import annotations

import copy
import pickle

import pytest

import convertd_core.conditions
from convertd_client import errors


def test_the_reasons_are_those_of_the_daemon_with_the_same_statuses() -> None:
    """A reason that only one of them knows is a mistake of whoever added it."""
    ours = {reason: kind.status for reason, kind in errors.BY_REASON.items()}
    theirs = {
        reason: str(kind.status) for reason, kind in convertd_core.conditions.BY_REASON.items()
    }
    assert ours == theirs


def test_every_status_of_the_daemon_has_a_class() -> None:
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
def test_a_reason_goes_by_its_status_where_they_disagree(
    status: str, reason: str, kind: type[errors.ConvertError]
) -> None:
    """A class must not promise what another status denies."""
    assert type(errors.of_status(status, reason, "no", {})) is kind


def test_a_reason_that_no_job_should_give_is_a_bug() -> None:
    """A job has no word of statuses."""
    assert type(errors.of_reason("WHATEVER", "no", {})) is errors.Internal


@pytest.mark.parametrize("again", [copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])  # noqa: S301
def test_an_error_passes_between_processes_whole(again: object) -> None:
    """As services hand them about."""
    assert callable(again)
    error = errors.NoSpace("full", reason="NO_SPACE", metadata={"free_bytes": "7"})
    twin = again(error)
    assert type(twin) is errors.NoSpace
    assert (str(twin), twin.reason, twin.metadata) == ("full", "NO_SPACE", {"free_bytes": "7"})


def test_what_may_have_been_done_is_not_caught_as_what_may_be_repeated() -> None:
    """`except Unavailable: try again` must be safe."""
    assert issubclass(errors.Unreachable, errors.Unavailable)
    assert not issubclass(errors.OutcomeUnknown, errors.Unavailable)
