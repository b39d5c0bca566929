"""What systemd makes of the units, offline: nothing to complain of, and how exposed they are."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import booted
import pytest

UNITS = booted.REPOSITORY / "packaging" / "systemd"

DROPINS = {
    "as-shipped": ("", 15),
    "roots-of-files": ("RestrictSUIDSGID=no\nReadWritePaths=-/srv/images\n", 17),
    "roots-of-devices": (UNITS.joinpath("drop-in.example").read_text(encoding="utf-8"), 19),
}


@pytest.mark.parametrize(("dropin", "limit"), DROPINS.values(), ids=DROPINS)
def test_service_exposure_score_is_at_most(tmp_path: Path, dropin: str, limit: int) -> None:
    """`systemd-analyze security`, in tenths: 15 as shipped, 19 with roots of block devices."""
    unit = tmp_path / "convertd.service"
    shipped = UNITS.joinpath("convertd.service").read_text(encoding="utf-8")
    unit.write_text(
        shipped.replace("\n[Install]", f"\n{dropin.replace('[Service]', '')}\n[Install]")
    )
    measured = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={limit}", str(unit)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert measured.returncode == 0, measured.stdout


def test_each_capability_of_the_unit_has_a_comment() -> None:
    """A line of comment before each entry of the bounding set."""
    text = UNITS.joinpath("convertd.service").read_text(encoding="utf-8")
    entries = re.findall(r"(.*)\nCapabilityBoundingSet=(CAP_.*)", text)
    assert len(entries) == 6
    assert all(before.startswith("# ") for before, _ in entries)
