"""One job as the broker forks it, from its grant to its end, with nothing around it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from typing import TYPE_CHECKING, Final

from convertd_daemon import channel, errors, model
from convertd_daemon.broker import jobs, loop, queue, workers
from convertd_daemon.front import pipes
from convertd_daemon.sandbox import seccomp
from convertd_daemon.sandbox.identity import Identity
from convertd_daemon.sandbox.setup import Setup

if TYPE_CHECKING:
    from collections.abc import Iterator

WORKER: Final = Identity(uid=1500, gid=1500)


@functools.cache
def setup() -> Setup:
    """What the broker makes at its start."""
    compiled = seccomp.compile_profile(seccomp.QEMU_IMG)
    return Setup(path="/usr/bin/qemu-img", identity=WORKER, seccomp=compiled)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """All that a job said, in order."""

    events: tuple[object, ...]

    @property
    def failure(self) -> errors.Failure | None:
        """What it failed of."""
        found = [event.failure for event in self.events if isinstance(event, channel.Failed)]
        return found[0] if found else None

    @property
    def reason(self) -> str:
        """The reason of its failure, or "done"."""
        return self.failure.reason if self.failure else "done"

    @property
    def published(self) -> model.Published:
        """What it published."""
        assert self.failure is None, self.failure
        (found,) = (item.published for item in self.events if isinstance(item, channel.Succeeded))
        return found

    @property
    def inspected(self) -> channel.Inspected:
        """What it found an image to be."""
        assert self.failure is None, self.failure
        (found,) = (item for item in self.events if isinstance(item, channel.Inspected))
        return found


@contextlib.contextmanager
def started(
    grant: model.Grant | model.InspectGrant, *passphrases: bytes
) -> Iterator[tuple[jobs.Job, channel.Channel]]:
    """Fork a job; gives it, and the front's end of its channel. Afterwards it is gone."""
    lane: queue.Lane[jobs.Job] = queue.Lane(places=1, places_per_user=1, waiting=1, per_user=1)
    with pipes.holding(list(passphrases)) as held:
        job = jobs.Job(job_id="job-1", call=1, connection=1, grant=grant, lane=lane)
        line = job.start(workers.Spare(loop.Loop(), setup(), lambda: False), grant.peer)
        pipes.hand_on(held, line)
    with line:
        try:
            yield job, line
        finally:
            line.close()
            os.waitpid(job.pid, 0)
            job.close()


def run(grant: model.Grant | model.InspectGrant, *passphrases: bytes) -> Said:
    """Run a job to its end, and give all that it said."""
    events: list[object] = []
    with started(grant, *passphrases) as (_, line), contextlib.suppress(channel.Closed):
        while True:
            event, _ = line.receive(*channel.FROM_JOB)
            events.append(event)
    return Said(events=tuple(events))
