"""The repository speaks of the project alone, and what it installs is for everyone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A checkout's place is nobody else's. Directories that every machine has say nothing.
EVERYWHERE = {"/", "/home", "/mnt", "/opt", "/root", "/srv", "/tmp", "/usr/src", "/var/tmp"}  # noqa: S108 - names, not files
OWN_PLACES = {str(ROOT), str(ROOT.parent)} - EVERYWHERE

FORBIDDEN = re.compile(
    "|".join(
        (
            r"/home/[a-z]",  # somebody's home
            r"/Users/[A-Za-z]",
            r"--(?:extra-)?index-url",  # somebody's package index
            *(rf"(?<![\w./-]){re.escape(place)}(?![\w-])" for place in sorted(OWN_PLACES)),
        )
    )
)


def files() -> list[Path]:
    """What is in git, or would be with the next commit."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_path_on_a_developer_machine() -> None:
    """Neither where it was written, nor a home, nor a package index."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if FORBIDDEN.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("name", ["build", "daemon"])
def test_locked_requirements_are_complete_and_pinned(name: str) -> None:
    """By version and hashes; `make lock` writes both files, from pyproject.toml."""
    lock = (ROOT / "packaging" / "locked" / f"{name}.txt").read_text(encoding="utf-8")
    lines = [line for line in lock.replace("\\\n", "").splitlines() if not line.startswith("#")]
    pinned = re.compile(r"([a-z0-9-]+)==\S+(?: ; [^#]*?)?(?: +--hash=sha256:[0-9a-f]{64})+ *")
    assert [line for line in lines if not pinned.fullmatch(line)] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = {
        "build": project["build-system"]["requires"] + project["dependency-groups"]["build"],
        "daemon": project["project"]["dependencies"]
        + project["project"]["optional-dependencies"]["daemon"],
    }[name]
    exact = {line.split()[0] for line in lines}
    names = {re.split(r"[=<>]", one)[0] for one in wanted}
    assert names <= {one.split("==")[0] for one in exact}
    assert {one for one in wanted if "==" in one} <= exact


def test_generated_code_is_not_in_git() -> None:
    """The build makes it (docs/decisions/0001-generated-code.md)."""
    assert [path for path in files() if "_pb2" in path.name] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs uid 0 to become another, this is another")
@pytest.mark.parametrize("module", ["convertd.v1.convert_pb2_grpc", "convertd_client"])
def test_installed_modules_are_importable_by_every_user(module: str) -> None:
    """The tests run programs of ours as users who own nothing."""
    subprocess.run(
        [
            *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
            *(sys.executable, "-I", "-c", f"import {module}"),
        ],
        cwd="/",
        check=True,
        timeout=60,
    )
