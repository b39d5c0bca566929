"""Thousands of conversions, some cancelled, some killed: the daemon ends as it began.

CONVERTD_TEST_SOAK says how many; 300 take half a minute on two processors.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from harness import images, processes, waiting
from harness.agent import Agent, Call, conversion
from harness.callers import ALICE, BOB
from harness.daemon import FRONT, JOB, QEMU_IMG, Daemon
from policies import IMAGES, LIBRARY, Grant, Policy

from convertd.v1 import convert_pb2 as pb

POLICY: Final = Policy(
    limits={"jobs": 4, "jobs_per_user": 3},
    operators=[1234],
    grants=[Grant(users=[1234, 1235], read=[LIBRARY, IMAGES], write=[IMAGES])],
)

CONVERSIONS: Final = int(os.environ.get("CONVERTD_TEST_SOAK", "150"))
WARM_UP: Final = min(50, CONVERSIONS // 3)
SEED: Final = int(os.environ.get("CONVERTD_TEST_SEED", str(random.SystemRandom().getrandbits(32))))

AT_ONCE: Final = 8
MAY_GROW_KIB: Final = (2048, 3072)
"""Broker and front: what their allocators take before they use again what is free. A leak of 300
bytes a conversion would show in a long run."""

ENDS: Final = (
    *("finish", "finish", "finish", "be cancelled", "be cancelled by an operator"),
    *("kill a job", "kill a qemu-img"),
)
"""What becomes of a conversion, by the throw of a die."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that must be as it was: names, not numbers, so that a failure shows what is left."""

    broker_descriptors: tuple[str, ...]
    front_descriptors: tuple[str, ...]
    processes: tuple[str, ...]
    jobs: int


def state(daemon: Daemon, operator: Agent) -> State:
    """The daemon's, now."""
    return State(
        broker_descriptors=descriptors(daemon.pid),
        front_descriptors=descriptors(daemon.await_one(FRONT)),
        processes=tuple(sorted(one.name for one in daemon.processes())),
        jobs=len(operator.jobs()),
    )


def descriptors(pid: int) -> tuple[str, ...]:
    """What a process has open. A socket is one as good as another."""
    links = processes.descriptors(pid).values()
    return tuple(sorted(re.sub(r"\[[0-9]+\]", "", link) for link in links))


def await_as_before(daemon: Daemon, operator: Agent, before: State) -> None:
    """Wait until all is as it was: what a call leaves is tidied up a moment after its end."""
    with contextlib.suppress(AssertionError):
        waiting.until(lambda: state(daemon, operator) == before, "all as it was")
    assert state(daemon, operator) == before


def memory_kib(daemon: Daemon) -> tuple[int, int]:
    """What broker and front have for themselves."""
    return processes.anonymous_kib(daemon.pid), processes.anonymous_kib(daemon.await_one(FRONT))


@pytest.fixture
def chance() -> random.Random:
    """The test's dice. A run is thrown again with CONVERTD_TEST_SEED."""
    print(f"CONVERTD_TEST_SEED={SEED}")  # noqa: T201 - whoever reads a failure needs it
    return random.Random(SEED)  # noqa: S311 - not for secrets


@pytest.fixture
def agents(daemon: Daemon) -> tuple[Agent, Agent]:
    """Two callers."""
    return daemon.agent(ALICE), daemon.agent(BOB)


@pytest.mark.timeout(120 + 2 * CONVERSIONS)
def test_daemon_is_unchanged_after_many_conversions(
    daemon: Daemon,
    agents: tuple[Agent, Agent],
    library: Path,
    images_dir: Path,
    chance: random.Random,
) -> None:
    """Descriptors, processes, memory, temporaries, the queue and the table of jobs."""
    for agent in agents:
        agent.access()
    before = state(daemon, agents[0])
    work = Work(daemon, agents, library, images_dir)
    tally = collections.Counter(work.batches(WARM_UP, chance))
    await_as_before(daemon, agents[0], before)
    memory = memory_kib(daemon)
    tally += collections.Counter(work.batches(CONVERSIONS - WARM_UP, chance))
    await_as_before(daemon, agents[0], before)
    after = memory_kib(daemon)
    print(before, dict(tally), "KiB before", memory, "and after", after)  # noqa: T201 - figures
    assert all(
        now - then < most for now, then, most in zip(after, memory, MAY_GROW_KIB, strict=True)
    )
    assert "Traceback" not in daemon.log
    assert os.listdir(images_dir) == []
    assert not list(images_dir.glob(".*"))


class Work:
    """Conversions in batches; each batch is over, and its results gone, before the next begins."""

    def __init__(
        self, daemon: Daemon, agents: tuple[Agent, Agent], library: Path, directory: Path
    ) -> None:
        """Of the library's images, into one directory."""
        self.daemon = daemon
        self.agents = agents
        self.library = library
        self.directory = directory
        self.number = 0

    def batches(self, count: int, chance: random.Random) -> Iterator[str]:
        """Convert so many; how each ended."""
        for done in range(0, count, AT_ONCE):
            yield from self.batch(min(AT_ONCE, count - done), chance)

    def batch(self, count: int, chance: random.Random) -> list[str]:
        """Begin all, end each in its own way, wait for all."""
        # Kills first: what lasts and is ended later is there to be killed.
        ends = sorted((chance.choice(ENDS) for _ in range(count)), reverse=True)
        calls = []
        for end in ends:
            calls.append(self.begin(end, chance.choice(self.agents)))
            if end.startswith("kill"):
                # Calls of one connection may overtake each other, and it must not wait for others.
                calls[-1].await_event(lambda event: bool(job_id_of(event)))
        for end, call in zip(ends, calls, strict=True):
            self.bring_about(end, call)
        outcomes = [call.end().status for call in calls]
        self.daemon.await_idle()
        for path in self.directory.iterdir():
            assert path.suffix == ".qcow2", path
            path.unlink()
        return outcomes

    def begin(self, end: str, agent: Agent) -> Call:
        """Ask for a conversion: one that lasts, unless it is to finish."""
        self.number += 1
        dest = self.directory / f"{self.number}.qcow2"
        if end == "finish":
            return agent.convert(conversion(self.library / "small.raw", dest))
        source = self.library / "bulky.raw"
        request = conversion(source, dest, rate_limit_bytes_per_second=images.MIB)
        return agent.convert(request)

    def bring_about(self, end: str, call: Call) -> None:
        """End a conversion in the way it is to end."""
        match end:
            case "be cancelled":
                call.cancel()
            case "be cancelled by an operator":
                first = call.await_event(lambda event: bool(job_id_of(event)))
                request = pb.CancelJobRequest(job_id=job_id_of(first))
                # It may be the one whose process was killed for another.
                ended = self.agents[0].call("CancelJob", request).end()
                assert ended.status in {"OK", "NOT_FOUND"}
            case "kill a job" | "kill a qemu-img":
                # It may have been killed for another, before it had started or since.
                if any(event.HasField("started") for event in call.events()):
                    self.kill(JOB if end == "kill a job" else QEMU_IMG)
                call.cancel()

    def kill(self, name: str) -> None:
        """Kill one of that name, whosever it is, unless no job is left."""
        waiting.until(
            lambda: self.daemon.processes(name) or not self.daemon.processes(JOB),
            f"a process {name}, or none of a job",
        )
        for one in self.daemon.processes(name)[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)


def job_id_of(event: pb.ConvertResponse) -> str:
    """The job that an event is about."""
    return event.started.job_id or event.progress.job_id or event.result.job_id
