"""One job as the broker forks it, from its grant to its end, with nothing around it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from typing import TYPE_CHECKING, Final

import children

from convertd_core import conditions, messages, results, values
from convertd_daemon import channel, loop
from convertd_daemon.front import secret_pipes
from convertd_daemon.job import process
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
class JobEvents:
    """All that a job said, in order."""

    events: tuple[object, ...]

    @property
    def failure(self) -> conditions.Failure | None:
        """What it failed of."""
        found = [event.failure for event in self.events if isinstance(event, messages.Failed)]
        return found[0] if found else None

    @property
    def reason(self) -> str:
        """The reason of its failure, or "done"."""
        return self.failure.reason if self.failure else "done"

    @property
    def plan(self) -> results.Plan:
        """What it was going to do."""
        (found,) = (event.plan for event in self.events if isinstance(event, messages.Planned))
        return found

    @property
    def published(self) -> results.ConvertResult:
        """What it published."""
        assert self.failure is None, self.failure
        (found,) = (event.result for event in self.events if isinstance(event, messages.Succeeded))
        return found

    @property
    def inspected(self) -> results.ImageInfo:
        """What it found an image to be."""
        assert self.failure is None, self.failure
        (found,) = (event.image for event in self.events if isinstance(event, messages.Inspected))
        return found


@contextlib.contextmanager
def started(
    grant: values.ConvertGrant | values.InspectGrant, *passphrases: bytes
) -> Iterator[tuple[process.JobProcess, channel.Channel]]:
    """Fork a job; gives it, and the front's end of its channel. Afterwards it is gone."""
    with secret_pipes.holding(list(passphrases)) as held:
        prefork = process.PreforkedJob(loop.Loop(), setup(), lambda: False)
        with children.logging_to_stderr():
            job = prefork.begin("job-1", grant)
        secret_pipes.hand_on(held, job.channel)
    try:
        yield job, job.channel
    finally:
        job.close()
        os.waitpid(job.pid, 0)


def run(grant: values.ConvertGrant | values.InspectGrant, *passphrases: bytes) -> JobEvents:
    """Run a job to its end, and give all that it said."""
    events: list[object] = []
    with started(grant, *passphrases) as (_, line), contextlib.suppress(channel.Closed):
        while True:
            event, _ = line.receive(*messages.FROM_JOB)
            events.append(event)
    return JobEvents(events=tuple(events))
