"""Pages of the job list: bounded in bytes, so that an answer that nobody takes costs little."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from convertd_core import conditions

if TYPE_CHECKING:
    from collections.abc import Iterable

    from convertd_daemon.broker.jobs import Job

MOST_JOBS: Final = 1000
"""On a page, if the caller asks for none in particular, or for more."""

MOST_BYTES: Final = 64 * 1024
"""Of a page's texts, as the caller wrote them; one job is shown in any case."""

TOKEN: Final = re.compile(r"[0-9a-f]{1,16}")


def page_of(jobs: Iterable[Job], size: int, token: str) -> tuple[list[Job], str]:
    """Give the jobs, oldest first, that come after the page that gave the token.

    Returns:
        The page, and the token for the next; empty if there is none.

    Raises:
        conditions.BadOption: a size or a token that can't be meant.
    """
    if size < 0:
        raise conditions.BadOption(field="page_size", problem="must not be negative")
    if token and not TOKEN.fullmatch(token):
        raise conditions.BadOption(field="page_token", problem="is none that ListJobs gave")
    after, room = int(token or "0", 16), MOST_BYTES
    page: list[Job] = []
    for job in jobs:
        if job.order <= after:
            continue
        room -= job.text_bytes
        if page and (room < 0 or len(page) == min(size or MOST_JOBS, MOST_JOBS)):
            return page, f"{page[-1].order:x}"
        page.append(job)
    return page, ""
