"""What a job tells of its end, and to whom."""

from __future__ import annotations

import os

from convertd_core import conditions, messages
from convertd_daemon import channel
from convertd_daemon.job import outcome


def test_job_reports_to_its_caller_after_the_broker_died() -> None:
    """There is nobody to keep a record, which is not the caller's affair."""
    ours, theirs = channel.Channel.pair()
    read_end, write_end = os.pipe()
    os.close(read_end)
    failed = messages.Failed(failure=conditions.Stopping().failure())
    with ours, outcome.OutcomeReporter(theirs.sock, write_end) as job:
        job.send(failed)
        assert ours.receive(messages.Failed) == (failed, [])
