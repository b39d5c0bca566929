"""A job as the broker forks it: it converts, and says how it ended."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import grants
import whole_job

MIB = 1024 * 1024


def test_granted_job_converts_and_reports_its_result(area: Path) -> None:
    """Plan, progress, result, in that order."""
    (area / "in").write_bytes(os.urandom(MIB))
    rules = grants.Rules(roots=(grants.files(area),))
    grant = rules.convert(grants.request(area / "in", area / "out", dest_format="qcow2"))
    outcome = whole_job.run(grant)
    assert outcome.plan.source_format == outcome.published.source_format == "raw"
    ends = [str(area / "in"), str(area / "out")]
    compare = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", *ends]
    subprocess.run(compare, check=True, capture_output=True)
