"""make install on a booted system: what is there, what starts, who may."""

from __future__ import annotations

import booted

ALICE = 1234


def test_the_first_call_starts_the_service(machine: booted.Machine) -> None:
    """The socket listens; the daemon is there when somebody needs it."""
    machine.run("systemctl", "stop", "convertd.service")
    assert machine.show("convertd.service", "ActiveState") == {"ActiveState": "inactive"}
    said = machine.say("convertctl", "access", uid=ALICE)
    assert f"you are alice (uid {ALICE}, gid {ALICE})" in said
    assert machine.show("convertd.service", "ActiveState", "Result") == {
        "ActiveState": "active",
        "Result": "success",
    }


def test_the_policy_that_is_installed_grants_nothing(machine: booted.Machine) -> None:
    """An install alone opens nothing to anybody."""
    machine.revoke()
    refused = machine.run("convertctl", "info", "/etc/hostname", uid=ALICE, check=False)
    assert refused.returncode == 1
    assert "PERMISSION_DENIED" in refused.stderr
    assert "nobody may convert anything" in machine.say("convertd", "check")
