"""The job list comes in pages, of which nobody who uses our clients hears."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from harness.agent import Agent, conversion
from harness.callers import ALICE, BOB, PYTHON
from harness.daemon import Daemon
from policies import IMAGES, LIBRARY, Grant, Policy

from convertd.v1 import convert_pb2 as pb

POLICY: Final = Policy(
    limits={"jobs": 1}, grants=[Grant(users=[1234, 1235], read=[LIBRARY], write=[IMAGES])]
)

JOBS: Final = 24
ASYNC: Final = """
import asyncio, json
from convertd_client import aio
async def main():
    async with aio.AsyncClient() as client:
        print(json.dumps([job.label for job in await client.jobs()]))
asyncio.run(main())
"""

LONG: Final = "/".join(["d" * 200] * 18)


@pytest.fixture
def labels(daemon: Daemon, library: Path, images_dir: Path) -> Iterator[list[str]]:
    """Alice's jobs, oldest first, more than a page of texts; and one of Bob's."""
    calls, names = [], [f"job {number}" for number in range(JOBS)]
    for number, name in enumerate([*names, "another's"]):
        dest = images_dir / LONG / str(number) if number else images_dir / "first"
        agent = daemon.agent(ALICE if name in names else BOB)
        slow = conversion(
            library / "bulky.raw", dest, label=name, rate_limit_bytes_per_second=2**20
        )
        calls.append(agent.convert(slow))
        calls[-1].await_event(lambda event: bool(event.progress.job_id or event.started.job_id))
    yield names
    for call in calls:
        call.cancel()
    for call in calls:
        call.end()
    daemon.await_idle()


def pages(agent: Agent, size: int) -> list[list[str]]:
    """All pages of that size, by labels."""
    request, found = pb.ListJobsRequest(page_size=size), list[list[str]]()
    while True:
        page = agent.ask("ListJobs", request, pb.ListJobsResponse)
        found.append([job.label for job in page.jobs])
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


def test_job_list_pages_contain_each_job_once_and_in_order(
    daemon: Daemon, labels: list[str]
) -> None:
    """As many as were asked for, or as fit."""
    alice = daemon.agent(ALICE)
    by_five = pages(alice, 5)
    assert [len(page) for page in by_five] == [5, 5, 5, 5, 4]
    assert sum(by_five, []) == labels  # noqa: RUF017 - a handful
    as_fit = pages(alice, 0)
    assert len(as_fit) > 1
    assert sum(as_fit, []) == labels  # noqa: RUF017


def test_clients_list_jobs_of_all_pages(daemon: Daemon, labels: list[str]) -> None:
    """The command, which uses Python's; and that for asyncio."""
    result = ALICE.convertctl(daemon.socket, "jobs", "--json")
    assert [json.loads(line)["label"] for line in result.out.splitlines()] == labels, result
    argv = [PYTHON, "-I", "-c", ASYNC]
    ran = ALICE.run(argv, env={"CONVERTD_SOCKET": str(daemon.socket)})
    assert json.loads(ran.out) == labels, ran


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        pytest.param(pb.ListJobsRequest(page_size=-1), "page_size", id="a negative size"),
        pytest.param(pb.ListJobsRequest(page_token="x"), "page_token", id="another's token"),  # noqa: S106
        pytest.param(pb.ListJobsRequest(page_token="f" * 17), "page_token", id="a long token"),
    ],
)
def test_invalid_page_request_is_refused_with_the_field(
    daemon: Daemon, request_: pb.ListJobsRequest, field: str
) -> None:
    """And says which field it is."""
    refusal = daemon.agent(ALICE).call("ListJobs", request_).refusal()
    assert (refusal.status, refusal.reason) == ("INVALID_ARGUMENT", "BAD_OPTION")
    assert refusal.metadata["field"] == field


def test_next_page_continues_after_jobs_of_the_last_page_ended(
    daemon: Daemon, labels: list[str]
) -> None:
    """Also the one that the token was made of."""
    alice = daemon.agent(ALICE)
    first = alice.ask("ListJobs", pb.ListJobsRequest(page_size=3), pb.ListJobsResponse)
    alice.cancel_job(first.jobs[2].job_id)
    token = first.next_page_token
    second = alice.ask(
        "ListJobs", pb.ListJobsRequest(page_size=3, page_token=token), pb.ListJobsResponse
    )
    assert [job.label for job in second.jobs] == labels[3:6]
