"""make install on a booted system: what is there, what starts, who may."""

from __future__ import annotations

import re
from pathlib import Path

import booted
import pytest
from policies import Policy

ALICE = 1234

THE_SYSTEMS = (
    "/etc/.pwd.lock",
    "/etc/group",
    "/etc/gshadow",
    "/etc/passwd",
    "/etc/shadow",
    "/etc/subgid",
    "/etc/subuid",
    "/var/cache",
    "/var/lib/systemd",
    "/var/log",
)
"""Files that the system itself keeps: users stay, catalogs and journals are its own."""


def test_first_call_starts_the_service_by_socket_activation(machine: booted.Machine) -> None:
    """The socket listens; the daemon is there when somebody needs it."""
    machine.run("systemctl", "stop", "convertd.service")
    assert machine.show("convertd.service", "ActiveState") == {"ActiveState": "inactive"}
    said = machine.access(ALICE)
    assert f"you are alice (uid {ALICE}, gid {ALICE})" in said
    assert machine.show("convertd.service", "ActiveState", "Result") == {
        "ActiveState": "active",
        "Result": "success",
    }


def test_installed_policy_grants_nothing(machine: booted.Machine) -> None:
    """An install alone opens nothing to anybody."""
    machine.revoke()
    refused = machine.run("convertctl", "info", "/etc/hostname", uid=ALICE, check=False)
    assert refused.returncode == 1
    assert "PERMISSION_DENIED" in refused.stderr
    assert "nobody may convert anything" in machine.output_of("convertd", "check")


@pytest.mark.parametrize("page", ["convertd.8", "convertctl.1", "convertd-policy.5"])
def test_manual_pages_render_without_warnings(machine: booted.Machine, page: str) -> None:
    """Without a complaint of groff's."""
    section = page.rsplit(".", 1)[1]
    path = f"/usr/local/share/man/man{section}/{page}"
    shown = machine.run("sh", "-c", f"groff -k -t -man -Tutf8 -wmac -Wbreak {path} 2>&1 >/dev/null")
    assert shown.stdout == ""


def test_manual_page_and_completion_have_each_option(machine: booted.Machine) -> None:
    """Of convertd; convertctl's are made by itself."""
    output = machine.output_of("convertd", "--help")
    options = set(re.findall(r"--[a-z]+", output))
    assert {"--policy", "--socket"} < options
    page = booted.REPOSITORY / "docs" / "man" / "convertd.8.md"
    completion = booted.REPOSITORY / "packaging" / "completions" / "convertd.bash"
    assert options - {"--help"} <= set(re.findall(r"--[a-z]+", page.read_text()))
    assert options <= set(re.findall(r"--[a-z]+", completion.read_text()))
    assert "unit-dropin" in completion.read_text()


def test_counters_file_is_written_for_node_exporter(machine: booted.Machine) -> None:
    """Where the policy says, readable by its user, and the drop-in lets the service write there."""
    machine.run("mkdir", "-p", "/var/lib/exporter")
    exported = Policy(service={"metrics": "/var/lib/exporter/convertd.prom"})
    machine.grant("/srv/images", ALICE, exported)
    machine.run("qemu-img", "create", "-q", "-f", "raw", "/srv/images/m.raw", "1M")
    dest = "/srv/images/m.qcow2"
    machine.run("convertctl", "convert", "/srv/images/m.raw", dest, "-O", "qcow2", uid=ALICE)
    machine.run("convertctl", "info", "/etc/passwd", uid=ALICE, check=False)
    machine.run("systemctl", "stop", "convertd.service")
    text = machine.run("cat", "/var/lib/exporter/convertd.prom", uid=ALICE).stdout
    labels = '{dest_format="qcow2",method="copy",reason="",source_format="raw"}'
    assert f"convertd_conversion_bytes_total{labels} 1.048576e+06" in text
    assert f"convertd_conversion_seconds_count{labels} 1.0" in text
    assert 'convertd_refusals_total{reason="PERMISSION_DENIED"} 1.0' in text


def test_uninstall_leaves_only_the_policy(
    built: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What an install made is gone, used or not."""
    with booted.machine(tmp_path_factory.mktemp("uninstalled")) as machine:
        before = machine.changes()
        machine.run("make", "--silent", "--directory", str(built), "install")
        machine.run("systemctl", "enable", "--now", "convertd.socket")
        assert machine.access(ALICE)
        assert "/usr/local/bin/convertd" in machine.changes()
        machine.run("make", "--silent", "--directory", str(built), "uninstall")
        left = {path for path in machine.changes() - before if not path.startswith(THE_SYSTEMS)}
        assert left == {"/etc/convertd/policy.toml"}
        assert machine.run("test", "-e", "/run/convertd", check=False).returncode == 1
        assert machine.show("convertd.service", "LoadState") == {"LoadState": "not-found"}
