"""What a host gets is pinned, and is the same from the same commit."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import booted
import pytest


def make(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run make in a checkout, with the tools of ours and nothing from the network."""
    return subprocess.run(
        ["make", "--silent", "--old-file=build/tools/.made", *arguments],
        cwd=checkout,
        env={**os.environ, "PIP_NO_INDEX": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


@pytest.fixture(scope="module")
def package(built: Path) -> Path:
    """What `make deb` makes here."""
    subprocess.run(["make", "--silent", "deb"], cwd=built, check=True, timeout=280)
    (made,) = (built / "dist").glob("convertd_*.deb")
    return made


@pytest.fixture(scope="module")
def clone(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same commit, and what is not yet committed, at another place and without a package.

    It has what is pinned: the tools, and what was downloaded.
    """
    here = booted.REPOSITORY
    place = tmp_path_factory.mktemp("clone") / "somewhere" / "else-with-a-longer-name"
    subprocess.run(["git", "clone", "--quiet", here, place], check=True, timeout=60)
    status = ["git", "ls-files", "-z", "--modified", "--others", "--exclude-standard"]
    changed = subprocess.check_output(status, cwd=here, text=True).split("\0")
    for name in filter(None, changed):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(here / name, place / name)
    (place / "build").mkdir()
    (place / "build" / "tools").symlink_to(here / "build" / "tools")
    shutil.copytree(here / "build" / "downloads", place / "build" / "downloads")
    assert package.exists()
    return place


@pytest.fixture(scope="module")
def again(clone: Path) -> Path:
    """The package made once more: elsewhere, later, by somebody of other habits."""
    before = os.umask(0o077)
    try:
        habits = {"TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "2", "COLUMNS": "200"}
        done = make(clone, "deb", **habits)
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    (made,) = (clone / "dist").glob("convertd_*.deb")
    return made


def digests(package: Path, place: Path) -> dict[str, str]:
    """The hash of each file in a package."""
    subprocess.run(["dpkg-deb", "--raw-extract", package, place], check=True, timeout=60)
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in place.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def test_package_build_is_reproducible_from_one_commit(
    package: Path, again: Path, tmp_path: Path
) -> None:
    """Byte for byte, and the list of what is in it too."""
    there, here = digests(again, tmp_path / "there"), digests(package, tmp_path / "here")
    assert {name for name in there | here if there.get(name) != here.get(name)} == set()
    assert len(there) > 500
    assert again.name == package.name
    assert again.read_bytes() == package.read_bytes()
    suffix = ".cdx.json"
    assert again.with_suffix(suffix).read_bytes() == package.with_suffix(suffix).read_bytes()


def test_package_date_is_that_of_its_commit(package: Path) -> None:
    """Neither of the day on which it was made, nor of any file's."""
    told = ["git", "log", "-1", "--format=%cd", "--date=format-local:%Y-%m-%d %H:%M"]
    utc = {**os.environ, "TZ": "UTC"}
    date = subprocess.check_output(told, cwd=booted.REPOSITORY, env=utc, text=True).strip()
    listed = subprocess.check_output(["dpkg-deb", "--contents", package], env=utc, text=True)
    assert {" ".join(line.split()[3:5]) for line in listed.splitlines()} == {date}


def test_package_lists_its_bundled_dependencies(package: Path, tmp_path: Path) -> None:
    """By name and version: all that is installed, and all of it is pinned."""
    subprocess.run(["dpkg-deb", "--extract", package, tmp_path], check=True, timeout=60)
    beside = package.with_suffix(".cdx.json").read_text()
    assert (tmp_path / "usr/share/convertd/sbom.cdx.json").read_text() == beside
    assert (tmp_path / "usr/share/doc/convertd/sbom.cdx.json").read_text() == beside
    listed = json.loads(beside)
    assert listed["bomFormat"] == "CycloneDX"
    ours = listed["metadata"]["component"]
    installed = {
        tuple(path.name.removesuffix(".dist-info").lower().replace("_", "-").rsplit("-", 1))
        for path in tmp_path.glob("usr/lib/convertd/lib/python3*/site-packages/*.dist-info")
    }
    components = {
        (one["name"].lower().replace("_", "-"), one["version"]) for one in listed["components"]
    }
    assert components | {(ours["name"], ours["version"])} == installed
    lock = (booted.REPOSITORY / "packaging" / "locked" / "daemon.txt").read_text()
    pinned = set(re.findall(r"^([a-z0-9-]+)==(\S+)", lock, re.MULTILINE))
    assert components <= pinned
    assert str(booted.REPOSITORY) not in beside


def test_tampered_wheel_is_not_installed(clone: Path, again: Path, tmp_path: Path) -> None:
    """Whoever could write where it lay meanwhile: nothing is put in place."""
    assert again.exists()
    (wheel,) = (clone / "build" / "wheels").glob("mdurl-*.whl")
    whole = wheel.read_bytes()
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("mdurl/evil.py", "")
    done = make(clone, "install", f"DESTDIR={tmp_path}", "PREFIX=/usr")
    wheel.write_bytes(whole)
    assert done.returncode != 0
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr
    assert not (tmp_path / "usr" / "lib" / "convertd").exists()
    assert not (tmp_path / "usr" / "bin").exists()


def test_download_with_a_wrong_hash_is_not_installed(clone: Path, again: Path) -> None:
    """It does not come as far as to be installed."""
    assert again.exists()
    lock = clone / "packaging" / "locked" / "daemon.txt"
    before, name, rest = lock.read_text().partition("\nmdurl==")
    lock.write_text(before + name + re.sub(r"sha256:\w{4}", "sha256:0000", rest))
    done = make(clone, "installable")
    assert done.returncode != 0
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr
    assert list((clone / "build" / "wheels").glob("*")) == []
