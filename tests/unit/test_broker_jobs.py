"""The broker's table of jobs: the state of each, and what is listed of it."""

from __future__ import annotations

import dataclasses
import datetime
import socket
from collections.abc import Iterator

import grants
import pytest
import refusals

from convertd_core import messages, results, values
from convertd_daemon import loop
from convertd_daemon.broker import (
    connections,
    job_list,
    jobs,
)
from convertd_daemon.sandbox import closer
from convertd_daemon.service import audit

RULES = grants.Rules(roots=(grants.files("/images"), grants.devices("/dev/vg")))
LIMITS = grants.limits(jobs=1, queue=3, inspections=2)


@pytest.fixture
def connection() -> Iterator[connections.Connection]:
    """Somebody connected."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        admitted = connections.Connections(
            values.DEFAULT_LIMITS, closer.Closer(loop.Loop().after)
        ).admit(ours)
        assert admitted is not None
        yield admitted


@pytest.fixture
def table() -> jobs.Jobs:
    """No jobs yet."""
    return jobs.Jobs(LIMITS)


def to(dest: str, **changes: object) -> values.ConvertGrant:
    """Leave to convert to a file of that name."""
    request = grants.request("/images/a", dest)
    return RULES.convert(dataclasses.replace(request, **changes))  # type: ignore[arg-type]


def add(
    table: jobs.Jobs,
    call: int,
    connection: connections.Connection,
    grant: values.ConvertGrant | values.InspectGrant,
) -> jobs.Job:
    """Queue what was granted."""
    asked = audit.RequestSummary(operation=messages.Operation.CONVERT, caller=connection.caller)
    return table.add(call, connection, grant, asked)


LOOK = RULES.inspect(values.Source(path="/images/a"))


def test_inspection_does_not_wait_behind_conversions(
    table: jobs.Jobs, connection: connections.Connection
) -> None:
    """Inspect, and what is only to be checked."""
    add(table, 1, connection, to("/images/b"))
    look = add(table, 2, connection, LOOK)
    check = add(table, 3, connection, to("/images/b", validate_only=True))
    assert (len(table.conversions), len(table.inspections)) == (1, 2)
    assert [table.inspections.next(), table.inspections.next()] == [look, check]


def test_destination_belongs_to_one_job_at_a_time(
    table: jobs.Jobs, connection: connections.Connection
) -> None:
    """Until it has published, or is gone; a look at the same path does not count."""
    first = add(table, 1, connection, to("/images/b"))
    add(table, 2, connection, to("/images/b", validate_only=True))
    busy = refusals.reason_of(lambda: add(table, 3, connection, to("/images/b")))
    assert busy == "DEST_BUSY"
    assert len(table) == 2
    first.finished = True
    second = add(table, 3, connection, to("/images/b"))
    table.remove(second)
    add(table, 4, connection, to("/images/b"))


def test_job_refused_by_a_full_queue_is_not_listed(
    table: jobs.Jobs, connection: connections.Connection
) -> None:
    """It is refused, and nothing of it stays."""
    for number in range(3):
        add(table, number, connection, to(f"/images/{number}"))
    full = refusals.reason_of(lambda: add(table, 9, connection, to("/images/9")))
    assert full == "QUEUE_FULL"
    assert table.by_call(9) is None
    assert len(table) == 3


def test_job_is_found_by_id_call_process_or_connection(
    table: jobs.Jobs, connection: connections.Connection
) -> None:
    """Its id, its call, its process, its connection."""
    job = add(table, 7, connection, to("/images/b"))
    job.pid = 4711
    assert table.find(job.job_id) is job
    assert table.by_call(7) is job
    assert table.by_pid(4711) is job
    assert table.by_connection(connection.number) == [job]
    for found in (table.find("x"), table.by_call(8), table.by_pid(1)):
        assert found is None
    assert table.by_connection(connection.number + 1) == []


def test_job_ids_are_unguessable(table: jobs.Jobs, connection: connections.Connection) -> None:
    """Whoever knows one could ask to cancel it; that it is refused is another thing."""
    ids = {add(table, number, connection, LOOK).job_id for number in range(3)}
    assert len(ids) == 3
    assert all(len(job_id) == 12 for job_id in ids)


def test_removed_job_releases_its_slot(
    table: jobs.Jobs, connection: connections.Connection
) -> None:
    """Whether it waited or ran."""
    running = add(table, 1, connection, to("/images/b"))
    waiting = add(table, 2, connection, to("/images/c"))
    assert table.conversions.next() is running
    assert table.conversions.next() is None
    table.remove(waiting)
    table.remove(running)
    assert (len(table), table.conversions.running, len(table.conversions)) == (0, 0, 0)


def test_reloaded_limits_apply_at_once(
    table: jobs.Jobs, connection: connections.Connection
) -> None:
    """As the policy was reloaded."""
    for number in (1, 2):
        add(table, number, connection, to(f"/images/{number}"))
    assert table.conversions.next() is not None
    assert table.conversions.next() is None
    table.set_limits(dataclasses.replace(LIMITS, jobs=2))
    assert table.conversions.next() is not None


def test_job_list_shows_the_request_without_secrets(
    table: jobs.Jobs, connection: connections.Connection
) -> None:
    """Paths and formats in the caller's own words."""
    job = add(table, 1, connection, to("/images/b", label="nightly"))
    job.position = 2
    listed = job_list.entry_of(job)
    assert listed == results.Job(
        job_id=job.job_id,
        uid=grants.CALLER.uid,
        source_path="/images/a",
        source_format="raw",
        dest_path="/images/b",
        dest_format="raw",
        state=results.JobState.QUEUED,
        label="nightly",
        progress=listed.progress,
        create_time=job.queued,
        start_time=None,
    )
    assert listed.progress.phase is results.Phase.QUEUED
    assert listed.progress.queue_position == 1
    look = job_list.entry_of(add(table, 2, connection, LOOK))
    assert (look.dest_path, look.dest_format, look.label) == ("", "", "")


def test_job_list_shows_when_a_job_started(
    table: jobs.Jobs, connection: connections.Connection
) -> None:
    """It is past the queue then, and the broker knows no more."""
    job = add(table, 1, connection, to("/images/b"))
    started = job.queued + datetime.timedelta(seconds=1)
    job.state, job.started, job.position = results.JobState.RUNNING, started, 2
    listed = job_list.entry_of(job)
    assert (listed.create_time, listed.start_time) == (job.queued, started)
    assert listed.progress.phase is results.Phase.PREPARING
    assert listed.progress.queue_position == 0


@pytest.mark.parametrize(
    ("dest", "state", "expected"),
    [
        ("/dev/vg/lv", results.JobState.RUNNING, True),
        ("/dev/vg/lv", results.JobState.CANCELLING, True),
        ("/dev/vg/lv", results.JobState.QUEUED, False),
        ("/images/b", results.JobState.RUNNING, False),
    ],
)
def test_running_job_marks_its_device_as_possibly_undefined(
    table: jobs.Jobs,
    connection: connections.Connection,
    dest: str,
    state: results.JobState,
    expected: bool,  # noqa: FBT001
) -> None:
    """Which is what is said if it then ends without a word."""
    job = add(table, 1, connection, to(dest))
    job.state = state
    assert job.is_writing_a_device is expected
    job.finished = True
    assert job.is_writing_a_device is False
