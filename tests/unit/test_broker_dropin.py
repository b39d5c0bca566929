"""What a policy needs of the service, and what an installed unit lacks of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from convertd_daemon.admin import dropin
from convertd_daemon.policy import bind, decide, document

EXAMPLE = Path(__file__).parents[2] / "packaging" / "systemd" / "drop-in.example"

NOVA = """
[roots.instances]
path = "/var/lib/nova/instances"
access = "daemon"
[roots.volumes]
path = "/dev/nova"
kind = "block"
access = "daemon"
[roots.unused]
path = "/srv/unused"
access = "daemon"
[[grants]]
users = [64060]
read = ["instances", "volumes"]
write = ["instances", "volumes"]
"""

SHIPPED = {
    "ProtectSystem": "strict",
    "ReadWritePaths": "",
    "RestrictSUIDSGID": "yes",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "DeviceAllow": "char-rtc r",
}


def made(text: str) -> decide.Policy:
    """A policy without names."""
    return bind.bind(document.parse(text), bind.Ids(users={}, groups={}))


def grants(path: str, key: str = "write") -> str:
    """A policy that opens one directory."""
    write = 'write = ["one"]' if key == "write" else ""
    return f"""
[roots.one]
path = "{path}"
access = "daemon"
[[grants]]
users = [1]
read = ["one"]
{write}
"""


def test_drop_in_example_matches_its_policy() -> None:
    """Only what is granted; devices by their class, which is that of logical volumes if empty."""
    needs = dropin.needs_of(made(NOVA))
    assert dropin.text(needs, "/etc/convertd/policy.toml") == EXAMPLE.read_text(encoding="utf-8")


def test_drop_in_of_a_policy_without_grants_is_empty() -> None:
    """And the unit as shipped covers it."""
    needs = dropin.needs_of(made(""))
    assert not needs
    assert list(dropin.uncovered(needs, SHIPPED)) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        pytest.param("/srv/a", "ReadWritePaths=-/srv/a", id="plain"),
        pytest.param("/srv/100%", "ReadWritePaths=-/srv/100%%", id="specifier"),
        pytest.param("/srv/a b'c", 'ReadWritePaths="-/srv/a b\'c"', id="blank-and-quote"),
        pytest.param("/srv/\u00e9", 'ReadWritePaths="-/srv/\u00e9"', id="not-ascii"),
        pytest.param("/root/x", "ProtectHome=read-only", id="home"),
        pytest.param("/var/tmp/x", "PrivateTmp=no", id="temporary"),  # noqa: S108 - a name
    ],
)
def test_drop_in_opens_the_directory(path: str, line: str) -> None:
    """Each in the words of systemd.exec(5), quoted as systemd reads it."""
    assert line in dropin.text(dropin.needs_of(made(grants(path))), "p").splitlines()


def test_drop_in_opens_a_read_only_root_without_write_access() -> None:
    """ReadOnlyPaths, for a root that no grant writes."""
    lines = dropin.text(dropin.needs_of(made(grants("/srv/a", "read"))), "p").splitlines()
    assert "ReadOnlyPaths=-/srv/a" in lines
    assert not any(line.startswith("ReadWritePaths") for line in lines)


def test_shipped_unit_without_a_drop_in_reports_each_missing_access() -> None:
    """Each lack is told."""
    told = "\n".join(dropin.uncovered(dropin.needs_of(made(NOVA)), SHIPPED))
    for word in ("/var/lib/nova/instances", "openat2", "PrivateDevices", "device-mapper"):
        assert word in told


def test_installed_drop_in_covers_the_policy() -> None:
    """What was printed and installed is enough."""
    unit = SHIPPED | {
        "ReadWritePaths": "/var/lib -/var/lib/nova/instances",
        "RestrictSUIDSGID": "no",
        "PrivateDevices": "no",
        "DeviceAllow": "char-rtc r block-device-mapper rw",
    }
    assert list(dropin.uncovered(dropin.needs_of(made(NOVA)), unit)) == []
