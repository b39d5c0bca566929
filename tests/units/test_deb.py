"""The Debian package: installed, upgraded, removed and purged on a booted system."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import booted
import pytest

ALICE = 1234


@pytest.fixture(scope="module")
def package(built: Path) -> Path:
    """What `make deb` makes."""
    subprocess.run(["make", "--silent", "deb"], cwd=built, check=True, timeout=280)
    (made,) = (built / "dist").glob("convertd_*.deb")
    return made


@pytest.fixture(scope="module")
def newer(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, as if it were a later version."""
    tree = tmp_path_factory.mktemp("newer") / "tree"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True, timeout=60)
    control = tree / "DEBIAN" / "control"
    control.write_text(control.read_text().replace("Version: ", "Version: 999+"))
    policy = tree / "etc" / "convertd" / "policy.toml"
    policy.write_text(policy.read_text() + "# Something new.\n")
    made = tree.parent / "convertd_999.deb"
    command = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(tree), str(made)]
    subprocess.run(command, check=True, timeout=60)
    return made


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[booted.Machine]:
    """A machine without convertd."""
    with booted.machine(tmp_path_factory.mktemp("debian")) as fresh:
        # Images made for containers forbid packages to start anything.
        fresh.run("rm", "-f", "/usr/sbin/policy-rc.d")
        fresh.run("useradd", f"--uid={ALICE}", "alice")
        yield fresh


def dpkg(machine: booted.Machine, *arguments: str) -> str:
    """Run dpkg as an upgrade by apt does, and give what it said."""
    return machine.run("env", "DEBIAN_FRONTEND=noninteractive", "dpkg", *arguments).stdout


def put(machine: booted.Machine, package: Path) -> str:
    """Take a package into the machine."""
    shutil.copy(package, Path(f"/proc/{machine.leader}/root/var/tmp"))
    return f"/var/tmp/{package.name}"  # noqa: S108 - the machine's


def test_debian_package_is_installed_upgraded_removed_and_purged(
    machine: booted.Machine, package: Path, newer: Path
) -> None:
    """In the order of a package's life; each step needs the one before."""
    before = machine.changes()
    # Installed: the socket is enabled, the first call starts the service, nobody may do anything.
    dpkg(machine, "--install", put(machine, package))
    assert machine.output_of("systemctl", "is-enabled", "convertd.socket") == "enabled"
    assert "you may convert nothing" in machine.access(ALICE)
    assert machine.run("convertd", "check").stderr == ""
    # Used.
    machine.grant("/srv/images", ALICE)
    machine.run("qemu-img", "create", "-q", "-f", "raw", "/srv/images/a.raw", "1M")
    convert = ("convertctl", "convert", "/srv/images/a.raw")
    machine.run(*convert, "/srv/images/a.qcow2", "-O", "qcow2", uid=ALICE)
    granted = machine.output_of("cat", "/etc/convertd/policy.toml")
    # Upgraded: the policy stays, the daemon is another, a disabled socket would stay disabled.
    pid = machine.show("convertd.service", "MainPID")["MainPID"]
    machine.run("systemctl", "disable", "convertd.socket")
    dpkg(machine, "--install", "--force-confold", put(machine, newer))
    assert machine.output_of("cat", "/etc/convertd/policy.toml") == granted
    assert machine.show("convertd.socket", "UnitFileState") == {"UnitFileState": "disabled"}
    machine.run(*convert, "/srv/images/b.qcow2", "-O", "qcow2", uid=ALICE)
    assert machine.show("convertd.service", "MainPID")["MainPID"] not in {"0", pid}
    # Removed: nothing runs, the policy is kept. Purged: nothing is left.
    dpkg(machine, "--remove", "convertd")
    assert machine.run("test", "-e", "/run/convertd", check=False).returncode == 1
    assert machine.output_of("cat", "/etc/convertd/policy.toml") == granted
    dpkg(machine, "--purge", "convertd")
    left = {path for path in machine.changes() - before if "convertd" in path}
    assert {path for path in left if not path.startswith("/var/tmp")} == set()  # noqa: S108
