"""What a job tells of its end, and to whom."""

from __future__ import annotations

import os

from convertd_daemon import channel, errors
from convertd_daemon.job import account


def test_a_job_whose_broker_is_gone_still_tells_its_caller() -> None:
    """There is nobody to keep a record, which is not the caller's affair."""
    ours, theirs = channel.Channel.pair()
    read_end, write_end = os.pipe()
    os.close(read_end)
    failed = channel.Failed(failure=errors.Stopping().failure())
    with ours, account.Witness(theirs.sock, write_end) as job:
        job.send(failed)
        assert ours.receive(channel.Failed) == (failed, [])
