"""What a policy needs of the service, beyond what the unit that is shipped allows.

The unit as shipped opens nothing: everything read-only, no home, no device. What the policy's
roots need is given by a drop-in, so that a policy changed alone, by whomever, reaches no further.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from convertd_core import values

if TYPE_CHECKING:
    from convertd_daemon.policy.decide import Policy

PLACE: Final = "/etc/systemd/system/convertd.service.d/policy.conf"

HOMES: Final = ("/home", "/root", "/run/user")
"""What ProtectHome= hides. Source: systemd.exec(5)."""

TEMPORARY: Final = ("/tmp", "/var/tmp")  # noqa: S108 - named, not used
"""What PrivateTmp= replaces."""

LOGICAL_VOLUMES: Final = "block-device-mapper"
"""What a root of devices is taken to hold while it is empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What the service must be allowed. Devices by class, as DeviceAllow= names it, with access."""

    writes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    devices: tuple[tuple[str, str], ...] = ()

    @property
    def homes(self) -> bool:
        """Whether a home is among it."""
        return any(is_within(path, HOMES) for path in (*self.writes, *self.reads))

    @property
    def temporary(self) -> bool:
        """Whether a directory for temporary files is among it."""
        return any(is_within(path, TEMPORARY) for path in (*self.writes, *self.reads))

    def __bool__(self) -> bool:
        return bool(self.writes or self.reads or self.devices)


def needs_of(policy: Policy) -> Needs:
    """What the granted roots and the file with the counters need."""
    written = {root for rule in policy.rules for root in rule.write}
    read = {root for rule in policy.rules for root in rule.read} - written
    counters = {os.path.dirname(policy.service.metrics)} if policy.service.metrics else set()
    devices: dict[str, str] = {}
    for roots, access in ((read, "r"), (written, "rw")):
        for root in roots:
            if root.kind is values.RootKind.BLOCK:
                devices.update(dict.fromkeys(classes_in(root.path), access))
    return Needs(
        writes=tuple(sorted(_files(written) | counters)),
        reads=tuple(sorted(_files(read))),
        devices=tuple(sorted(devices.items())),
    )


def _files(roots: Iterable[values.Root]) -> set[str]:
    return {root.path for root in roots if root.kind is values.RootKind.FILE}


def classes_in(directory: str) -> frozenset[str]:
    """The classes of the block devices that a directory has now; logical volumes if it has none."""
    try:
        found = {os.stat(entry.path).st_rdev for entry in os.scandir(directory)}
    except OSError:
        found = set()
    names = _names_by_major()
    majors = {os.major(device) for device in found if device}
    return frozenset(f"block-{names[major]}" for major in majors if major in names) or frozenset(
        {LOGICAL_VOLUMES}
    )


def _names_by_major() -> Mapping[int, str]:
    """The names of block devices' major numbers. Source: /proc/devices in proc(5)."""
    with open("/proc/devices", encoding="ascii") as file:
        _, _, lines = file.read().partition("Block devices:\n")
    return {int(line.split()[0]): line.split()[1] for line in lines.splitlines()}


def text(needs: Needs, policy_path: str) -> str:
    """The drop-in, as one would write it."""
    return "\n".join((*_head(policy_path), *_body(needs), ""))


def _head(policy_path: str) -> Iterator[str]:
    yield f"# What {policy_path} needs of the service, as printed by `convertd unit-dropin`."
    yield "# To install it:"
    yield "#"
    yield f"#   mkdir -p {os.path.dirname(PLACE)}"
    yield f"#   convertd unit-dropin > {PLACE}"
    yield "#   systemctl daemon-reload"
    yield "#   systemctl restart convertd.service"
    yield ""
    yield "[Service]"


def _body(needs: Needs) -> Iterator[str]:
    if not needs:
        yield "# Nothing: the policy grants nothing."
        return
    yield "# systemd's filter for this also refuses openat2(2), which resolves every path."
    yield "RestrictSUIDSGID=no"
    # With "-" a root that is not there yet is no reason not to start.
    yield from (f"ReadWritePaths={_word(f'-{path}')}" for path in needs.writes)
    yield from (f"ReadOnlyPaths={_word(f'-{path}')}" for path in needs.reads)
    if needs.homes:
        yield "# A root is in a home directory."
        yield "ProtectHome=read-only"
    if needs.temporary:
        yield "# A root is in a directory for temporary files."
        yield "PrivateTmp=no"
    if needs.devices:
        yield "# Roots of block devices, by class. The policy says which devices of a class."
        yield "PrivateDevices=no"
        yield from (f"DeviceAllow={name} {access}" for name, access in needs.devices)


def _word(path: str) -> str:
    """One word of a unit file: specifiers are escaped, and what is special is quoted.

    Source: systemd.syntax(7), "Quoting".
    """
    path = path.replace("%", "%%")
    if path.isascii() and path.isprintable() and not set(path) & set(" \"'\\;"):
        return path
    escaped = path.replace("\\", "\\\\").replace('"', '\\"')
    shown = "".join(
        character if character.isprintable() else f"\\x{ord(character):02x}"
        for character in escaped
    )
    return f'"{shown}"'


def is_within(path: str, trees: Iterable[str]) -> bool:
    """Whether a path is one of these directories or lies in one."""
    return any(f"{path}/".startswith(f"{tree.rstrip('/')}/") for tree in trees)


def uncovered(needs: Needs, unit: Mapping[str, str]) -> Iterator[str]:
    """Report what a unit, by its properties in `systemctl show`, does not allow."""
    writable = _paths(unit.get("ReadWritePaths", ""))
    for path in needs.writes:
        if unit.get("ProtectSystem") == "strict" and not is_within(path, writable):
            yield f"{path} can't be written: it is in no ReadWritePaths="
    if needs and unit.get("RestrictSUIDSGID") == "yes":
        yield "no path can be resolved: RestrictSUIDSGID= refuses openat2(2)"
    if needs.homes and unit.get("ProtectHome") in {"yes", "tmpfs"}:
        yield "home directories are hidden by ProtectHome="
    if needs.temporary and unit.get("PrivateTmp") == "yes":
        yield f"{' and '.join(TEMPORARY)} are private to the service by PrivateTmp="
    if needs.devices and unit.get("PrivateDevices") == "yes":
        yield "devices are hidden by PrivateDevices="
    allowed = dict(line.rsplit(" ", 1) for line in _lists(unit.get("DeviceAllow", "")))
    for name, access in needs.devices:
        if not set(access) <= set(allowed.get(name, "")):
            yield f"devices of class {name} are in no DeviceAllow= with {access}"


def _paths(value: str) -> list[str]:
    return [path.lstrip("-+!") for path in value.split()]


def _lists(value: str) -> list[str]:
    """The pairs in what `systemctl show` prints of DeviceAllow=: each with a space in it."""
    words = value.split()
    return [f"{name} {access}" for name, access in zip(words[::2], words[1::2], strict=False)]
