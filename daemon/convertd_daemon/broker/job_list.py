"""The pages of ListJobs: a list that its caller does not read must take little memory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from convertd_core import conditions, results, values
from convertd_daemon.broker import jobs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from convertd_daemon.broker.jobs import Job

ENTRY_BYTES: Final = 128
"""About what an entry of the job list has beside its caller's own texts."""

PAGE_JOBS: Final = 1000
"""The most jobs on a page, and the default."""

PAGE_BYTES: Final = 64 * 1024
"""Of a page's texts, as the caller wrote them: an answer that nobody takes must cost little. It
always has one job."""

PAGE_TOKEN: Final = re.compile(r"[0-9a-f]{1,16}")


def entry_of(job: Job) -> results.Job:
    """The job as the list shows it, with what the broker knows of its progress."""
    request = job.grant.request
    dest = request.dest if isinstance(request, values.ConvertRequest) else None
    is_waiting = job.state is results.JobState.QUEUED
    return results.Job(
        job_id=job.job_id,
        uid=job.uid,
        source_path=request.source.path,
        source_format=request.source.format,
        dest_path=dest.path if dest else "",
        dest_format=dest.format if dest else "",
        state=job.state,
        label=request.label if isinstance(request, values.ConvertRequest) else "",
        progress=results.Progress(
            job_id=job.job_id,
            phase=results.Phase.QUEUED if is_waiting else results.Phase.PREPARING,
            # The contract counts those before it.
            queue_position=max(job.position - 1, 0) if is_waiting else 0,
            elapsed_seconds=max((jobs.now() - job.queued).total_seconds(), 0.0),
        ),
        create_time=job.queued,
        start_time=job.started,
    )


def page_of(listed: Iterable[Job], size: int, token: str) -> tuple[list[results.Job], str]:
    """Give the jobs, oldest first, that come after the page that gave the token.

    Returns:
        The page, and the token for the next; empty if there is none.

    Raises:
        conditions.BadOption: a size or a token that can't be meant.
    """
    if size < 0:
        raise conditions.BadOption(field="page_size", problem="must not be negative")
    if token and not PAGE_TOKEN.fullmatch(token):
        raise conditions.BadOption(
            field="page_token", problem="is not a token that ListJobs returned"
        )
    after = last = int(token or "0", 16)
    room = PAGE_BYTES
    page: list[results.Job] = []
    for job in listed:
        if job.order <= after:
            continue
        entry = entry_of(job)
        texts = f"{entry.source_path}{entry.dest_path}{entry.label}"
        room -= len(texts.encode()) + ENTRY_BYTES
        if page and (room < 0 or len(page) == min(size or PAGE_JOBS, PAGE_JOBS)):
            return page, f"{last:x}"
        page.append(entry)
        last = job.order
    return page, ""
