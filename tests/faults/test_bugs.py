"""What is nobody's fault but ours: INTERNAL, with an id that the log has too."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Final

import pytest
from harness import waiting
from harness.agent import conversion
from harness.callers import ALICE
from harness.daemon import JOB, QEMU_IMG, Daemon
from policies import IMAGES, LIBRARY, Grant, Policy

POLICY: Final = Policy(grants=[Grant(read=[LIBRARY], write=[IMAGES])])

MIB: Final = 1024 * 1024


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_crashed_job_is_reported_as_internal_with_an_id_in_the_log(
    daemon: Daemon, library: Path, images_dir: Path, number: signal.Signals
) -> None:
    """Nothing of what happened is told but that; nothing is left, and the next one is done."""
    request = conversion(
        library / "bulky.raw", images_dir / "dest.qcow2", rate_limit_bytes_per_second=MIB
    )
    agent = daemon.agent(ALICE)
    call = agent.convert(request)
    call.await_event(lambda event: event.progress.percent > 0)
    daemon.await_one(QEMU_IMG)
    os.kill(daemon.await_one(JOB), number)
    refusal = call.refusal()
    assert (refusal.status, refusal.reason) == ("INTERNAL", "INTERNAL_ERROR")
    assert set(refusal.metadata) == {"error_id"}
    error_id = refusal.metadata["error_id"]
    assert refusal.message == f"internal error; the log has it as {error_id}"
    daemon.await_logged(f"id={error_id}")
    daemon.await_idle()
    assert os.listdir(images_dir) == []
    waiting.until(lambda: not agent.jobs(), "its place is free")
    done = agent.convert(conversion(library / "small.raw", images_dir / "next.qcow2")).result()
    assert done.published
