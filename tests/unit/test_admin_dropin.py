"""What a policy needs of the service, and what an installed unit lacks of it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
from policies import Grant, Policy, Root

from convertd_daemon.admin import dropin
from convertd_daemon.policy import bind, decide, document

EXAMPLE = Path(__file__).parents[2] / "packaging" / "systemd" / "drop-in.example"

INSTANCES: Final = Root("instances", "/var/lib/nova/instances")
VOLUMES: Final = Root("volumes", "/dev/nova", kind="block")
NOVA = Policy(
    roots=[Root("unused", "/srv/unused")],
    grants=[Grant(users=[64060], read=[INSTANCES, VOLUMES], write=[INSTANCES, VOLUMES])],
)

SHIPPED = {
    "ProtectSystem": "strict",
    "ReadWritePaths": "",
    "RestrictSUIDSGID": "yes",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "DeviceAllow": "char-rtc r",
}


def bound(policy: Policy) -> decide.Policy:
    """A policy without names, as the daemon has it."""
    return bind.bind(document.parse(str(policy)), bind.Ids(users={}, groups={}))


def of_one_root(path: str, *, writable: bool = True) -> decide.Policy:
    """A policy that opens one directory."""
    root = Root("one", path)
    grant = Grant(users=[1], read=[root], write=[root] if writable else None)
    return bound(Policy(grants=[grant]))


def test_drop_in_example_matches_its_policy() -> None:
    """Only what is granted; devices by their class, which is that of logical volumes if empty."""
    needs = dropin.needs_of(bound(NOVA))
    assert dropin.text(needs, "/etc/convertd/policy.toml") == EXAMPLE.read_text(encoding="utf-8")


def test_drop_in_of_a_policy_without_grants_is_empty() -> None:
    """And the unit as shipped covers it."""
    needs = dropin.needs_of(bound(Policy()))
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
    assert line in dropin.text(dropin.needs_of(of_one_root(path)), "p").splitlines()


def test_drop_in_opens_a_read_only_root_without_write_access() -> None:
    """ReadOnlyPaths, for a root that no grant writes."""
    lines = dropin.text(dropin.needs_of(of_one_root("/srv/a", writable=False)), "p").splitlines()
    assert "ReadOnlyPaths=-/srv/a" in lines
    assert not any(line.startswith("ReadWritePaths") for line in lines)


def test_shipped_unit_without_a_drop_in_reports_each_missing_access() -> None:
    """Each lack is told."""
    told = "\n".join(dropin.uncovered(dropin.needs_of(bound(NOVA)), SHIPPED))
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
    assert list(dropin.uncovered(dropin.needs_of(bound(NOVA)), unit)) == []
