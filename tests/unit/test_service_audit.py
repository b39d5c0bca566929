"""The audit record: how urgent it is, and what it calls a request."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import grants
import pytest

from convertd_core import conditions, messages, values
from convertd_daemon.broker import dispatch
from convertd_daemon.service import audit

PAGE: Final = Path(__file__).parents[2] / "docs" / "operations.md"

CONVERSION: Final = grants.request("/images/a", "/images/b")


def record(
    body: messages.RequestBody, outcome: audit.Outcome = audit.Outcome.DONE, reason: str = ""
) -> audit.Record:
    """The record of a request, summed up as the broker does it."""
    asked = dispatch.ROWS[type(body)].summary(body, audit.NOBODY)
    return audit.Record(asked=asked, outcome=outcome, reason=reason)


@pytest.mark.parametrize(
    ("body", "priority"),
    [
        (CONVERSION, 6),
        (values.InspectRequest(source=CONVERSION.source), 6),
        (messages.CancelJob(job_id="1"), 6),
        (messages.ListJobs(), 7),
        (messages.GetAccess(), 7),
        (messages.GetStats(), 7),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_query_that_is_done_is_of_debug_priority(
    body: messages.RequestBody, priority: int
) -> None:
    """Others are for whoever reads the journal as it is."""
    assert record(body).priority == priority


def test_a_refused_query_is_a_notice() -> None:
    """Like every refusal; and a bug is an error."""
    body = messages.GetStats()
    assert record(body, audit.Outcome.REFUSED, "PERMISSION_DENIED").priority == 5
    bug = conditions.InternalError.reason
    assert record(body, audit.Outcome.REFUSED, bug).priority == 3


def test_operations_page_lists_each_operation() -> None:
    """As the record has them."""
    row = re.search(r"^\| `CONVERTD_OPERATION` \|(.*)\|$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert row is not None
    assert re.findall(r"`([a-z-]+)`", row[1]) == list(messages.Operation)
