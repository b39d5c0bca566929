"""Machines that have convertd, by `make install` and by the Debian package."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import booted
import pytest

ALICE = 1234
"""An unprivileged user, whom the policies here name by number."""


@pytest.fixture(scope="session")
def built() -> Path:
    """The checkout, with all made that an install needs."""
    subprocess.run(
        ["make", "--silent", "installable"], cwd=booted.REPOSITORY, check=True, timeout=280
    )
    return booted.REPOSITORY


@pytest.fixture(scope="session")
def machine(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[booted.Machine]:
    """A machine on which `make install` ran and the socket is enabled."""
    with booted.machine(tmp_path_factory.mktemp("installed")) as fresh:
        fresh.run("make", "--silent", "--directory", str(built), "install")
        fresh.run("useradd", f"--uid={ALICE}", "alice")
        fresh.run("systemctl", "enable", "--now", "convertd.socket")
        yield fresh


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Allow these tests to take longer: the first of each file may build, and boots."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.timeout(300))
