"""Requests of the front's: each has a row, is answered in full, and is put on record."""

from __future__ import annotations

import datetime
import logging
import os
import socket
from collections.abc import Iterator
from typing import get_args

import grants
import pytest

from convertd_core import messages, results, values
from convertd_daemon import loop
from convertd_daemon.broker import (
    connections,
    dispatch,
    job_supervisor,
    jobs,
)
from convertd_daemon.job import process
from convertd_daemon.sandbox import closer
from convertd_daemon.sandbox.setup import Setup
from convertd_daemon.service import reporting, selftest

RULES = grants.Rules(roots=(grants.files("/images"),))
VERSIONS = results.Versions(daemon="1", qemu_img="7.2", kernel="6.1", landlock_abi=2)
TESTED = selftest.SelfTest(
    qemu_version="7.2",
    formats=frozenset({"raw", "qcow2", "dmg"}),
    compressions=(values.Compression.ZLIB,),
)


class Front:
    """Hears what it is sent."""

    def __init__(self) -> None:
        self.is_behind = False
        self.heard: list[object] = []

    def send(self, message: object, descriptor: int | None = None) -> None:
        """Take a message, and let go of its descriptor."""
        self.heard.append(message)
        if descriptor is not None:
            os.close(descriptor)


class Asked:
    """A dispatcher with one caller connected, who is root, and no operator."""

    def __init__(self, ours: socket.socket) -> None:
        self.front = Front()
        a_loop = loop.Loop()
        table = connections.Connections(values.DEFAULT_LIMITS, closer.Closer(a_loop.after))
        connection = table.admit(ours)
        assert connection is not None
        self.number = connection.number
        now = messages.Stats(
            start_time=datetime.datetime.now(datetime.UTC),
            jobs_running=0,
            jobs_queued=0,
            connections=1,
        )
        reporter = reporting.Reporter(a_loop.after, lambda: now)
        setup = Setup(path="/usr/bin/qemu-img", identity=None, seccomp=b"")
        preforked = process.PreforkedJob(a_loop, setup, lambda: False)
        self.jobs = jobs.Jobs(values.DEFAULT_LIMITS)
        supervisor = job_supervisor.JobSupervisor(
            a_loop, self.jobs, preforked, self.front, reporter
        )
        handlers = dispatch.Handlers(RULES.policy, VERSIONS, TESTED, supervisor, reporter)
        self.dispatcher = dispatch.Dispatcher(handlers, table, self.front, reporter)

    def answers(self, body: messages.RequestBody, number: int = 0) -> list[messages.ReplyBody]:
        """All that answers a request over a connection, by default the one that there is."""
        request = messages.Request(call=7, connection=number or self.number, body=body)
        self.front.heard.clear()
        self.dispatcher.dispatch(request)
        replies = [item for item in self.front.heard if isinstance(item, messages.Reply)]
        assert all(reply.call == 7 for reply in replies)
        return [reply.body for reply in replies]


@pytest.fixture
def asked(caplog: pytest.LogCaptureFixture) -> Iterator[Asked]:
    """One caller, and the audit record in the test's log."""
    ours, theirs = socket.socketpair()
    with ours, theirs, caplog.at_level(logging.INFO, "convertd.audit"):
        yield Asked(ours)


def test_each_request_has_a_row() -> None:
    """One that is added to the messages alone would end the broker."""
    assert set(dispatch.ROWS) == set(get_args(messages.RequestBody))


def test_reply_is_complete(asked: Asked) -> None:
    """The last of it says so."""
    assert asked.answers(messages.ListJobs()) == [messages.ReplyComplete()]
    access, complete = asked.answers(messages.GetAccess())
    assert isinstance(access, results.Access)
    assert access.uid == os.getuid()
    assert access.source_formats == ("dmg", "qcow2", "raw")
    assert access.dest_formats == ("qcow2", "raw")
    assert complete == messages.ReplyComplete()


def test_refusal_is_the_only_reply_and_is_recorded(
    asked: Asked, caplog: pytest.LogCaptureFixture
) -> None:
    """By what it is called on record, and by whom it came."""
    (refused,) = asked.answers(messages.GetStats())
    assert isinstance(refused, messages.Refused)
    assert refused.failure.reason == "PERMISSION_DENIED"
    for part in ("operation=get-stats", "outcome=refused", f"uid={os.getuid()}"):
        assert part in caplog.text


def test_over_no_connection_nothing_is_done(asked: Asked, caplog: pytest.LogCaptureFixture) -> None:
    """It is nobody's request, and on record as that."""
    (refused,) = asked.answers(messages.CancelJob(job_id="x"), asked.number + 1)
    assert isinstance(refused, messages.Refused)
    assert refused.failure.reason == "UNKNOWN_CONNECTION"
    assert "operation=cancel-job" in caplog.text
    assert "uid=" not in caplog.text


def test_a_request_that_the_policy_refuses_has_no_job(asked: Asked) -> None:
    """It never comes into a queue."""
    request = grants.request("/elsewhere/a", "/images/b")
    (refused,) = asked.answers(request)
    assert isinstance(refused, messages.Refused)
    assert refused.failure.reason == "PERMISSION_DENIED"
    assert len(asked.jobs) == 0
