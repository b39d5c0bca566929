"""SIGTERM at any instruction of a job: between a call and its answer, too.

A profile function, which Python calls at each call and return, sends the signal; the job's own code
knows nothing of it. Tried are the first return of each function of Python's own, and some instants
between; with CONVERTD_TEST_CUTS=all every one.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import grants
import pytest
import whole_job

from convertd_core import values
from convertd_daemon.job import context

CUTS: Final = os.environ.get("CONVERTD_TEST_CUTS", "20")
SEED: Final = int(os.environ.get("CONVERTD_TEST_SEED", "1"))
KIB: Final = 1024
MANY: Final = 4096


class Instants:
    """Counts what a forked job does, in memory that it shares with us; at one count it is hit."""

    def __init__(self, hit_at: int = 0) -> None:
        """Hit it at its `hit_at`-th event, or never at 0."""
        self._hit_at = hit_at
        self._parent = os.getpid()
        self._area = mmap.mmap(-1, MANY * 8)
        self._counts = memoryview(self._area).cast("q")
        self._known: set[str] = set()

    @property
    def seen(self) -> int:
        """How many events there were."""
        return self._counts[0]

    @property
    def firsts(self) -> list[int]:
        """Those at which a function that is written in C returned for the first time."""
        return list(self._counts[2 : 2 + self._counts[1]])

    @property
    def at_its_end(self) -> list[int]:
        """Those around the last call in which the job makes itself deaf to SIGTERM."""
        ends_at = self._counts[MANY - 1]
        assert ends_at > 0
        return list(range(ends_at - 3, ends_at + 8))

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count in the processes that are forked in the block, and not in theirs."""
        sys.setprofile(self._event)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _event(self, frame: types.FrameType, event: str, argument: object) -> None:
        if os.getppid() != self._parent:
            return
        self._counts[0] += 1
        if event == "call" and frame.f_code is context.ignore_sigterm.__code__:
            self._counts[MANY - 1] = self.seen
        name = getattr(argument, "__qualname__", "")
        if event == "c_return" and name not in self._known:
            self._known.add(name)
            self._counts[1] += 1
            self._counts[1 + self._counts[1]] = self.seen
        if self.seen == self._hit_at:
            os.kill(os.getpid(), signal.SIGTERM)


def instants(events: Instants) -> list[int]:
    """All of them; or where something new returns, and some from each part of the job."""
    if CUTS == "all":
        return list(range(1, events.seen + 1))
    pick = random.Random(SEED)  # noqa: S311 - a test's, to be repeated
    part = events.seen / int(CUTS)
    spread = [int((number + pick.random()) * part) + 1 for number in range(int(CUTS))]
    return events.firsts + spread + events.at_its_end


@pytest.mark.timeout(7200 if CUTS == "all" else 900)
@pytest.mark.parametrize("overwrite", [False, True])
def test_sigterm_at_any_instruction_leaves_a_whole_result_or_none(
    area: Path, capfd: pytest.CaptureFixture[str], *, overwrite: bool
) -> None:
    """The result is whole or is not there, nothing else lies about, and the log has no traceback.

    The source is a qcow2 and warm, so that it is probed, examined and looked for in memory.
    """
    source, dest, before = (area / name for name in ("in.qcow2", "out.raw", "before"))
    content = random.Random(SEED).randbytes(256 * KIB)  # noqa: S311 - what, does not matter
    (area / "content").write_bytes(content)
    argv = ["qemu-img", "convert", "-O", "qcow2", "-f", "raw", "content", source.name]
    subprocess.run(argv, check=True, cwd=area)
    before.write_bytes(b"the old one")
    there = set(os.listdir(area))
    rules = grants.Rules(roots=(grants.files(area),), overwrite=values.OverwriteScope.ANY)
    asked = grants.to(grants.request(source, dest, "qcow2", "raw"), overwrite=overwrite)

    def outcome(instant: int) -> tuple[Instants, str]:
        if overwrite:
            shutil.copy(before, dest)
        events = Instants(instant)
        with events.counted():
            whole_job.run(rules.convert(asked))
        log = capfd.readouterr().err
        assert "Traceback" not in log, (instant, log)
        assert set(os.listdir(area)) <= there | {dest.name}, instant
        if not dest.exists():
            return events, "absent"
        found = dest.read_bytes()
        dest.unlink()
        if found == before.read_bytes():
            return events, "old"
        assert found == content, instant
        return events, "new"

    events, whole = outcome(0)
    assert whole == "new"
    untouched = "old" if overwrite else "absent"
    outcomes = Counter(outcome(instant)[1] for instant in instants(events))
    assert set(outcomes) == {untouched, "new"}
    print(events.seen, outcomes)  # noqa: T201 - the figures of a long run
