"""The policy file, parsed strictly: TOML text becomes a Document.

Pure. Users and groups are names still, whose ids have to be looked up; bind.py makes a Policy of a
Document. docs/policy.md has every key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from convertd_core import values
from convertd_daemon.policy import value_types

DEFAULT_FORMATS: Final = (value_types.WritableFormat("raw"), value_types.WritableFormat("qcow2"))
DEFAULT_MODE: Final = 0o600
DEFAULT_QEMU_IMG: Final = value_types.AbsolutePath("/usr/bin/qemu-img")

BOUNDS: Final = {
    "jobs": (1, 256),
    "jobs_per_user": (1, 256),
    "queue": (1, 65536),
    "queue_per_user": (1, 65536),
    "inspections": (1, 256),
    "inspections_per_user": (1, 256),
    "connections": (1, 65536),
    "connections_per_user": (1, 65536),
    "virtual_size": ("1 MiB", "1024 PiB"),
    "memory": ("64 MiB", "1 TiB"),
    "stall": ("1 s", "7 d"),
    "duration": ("1 s", "365 d"),
    "inspect": ("1 s", "1 h"),
    "stop_grace": ("0 s", "1 d"),
}
"""The least and the most that each limit may be, as it would be written."""

SYSTEM_TREES: Final = (
    "/bin",
    "/boot",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/proc",
    "/sbin",
    "/sys",
    "/usr",
)
"""Directories that no root may be, nor lie in: a user who writes there controls the machine."""
TOO_WIDE: Final = ("/", "/dev", "/run")
"""Directories that no root may be, though one may lie in them."""


class PolicyError(Exception):
    """A mistake in a policy: where, as a path of keys, and what is wrong there.

    The key is empty when the text as a whole can't be read.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}" if key else reason)
        self.key = key
        self.reason = reason


# --- the keys of the file ------------------------------------------------------------------------


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A TOML table of which every key is known."""


_DEFAULT: Final = values.DEFAULT_LIMITS


class LimitsTable(_Table, frozen=True):
    """[limits]. See BOUNDS."""

    jobs: value_types.Count = value_types.Count(_DEFAULT.jobs)
    jobs_per_user: value_types.Count = value_types.Count(_DEFAULT.jobs_per_user)
    queue: value_types.Count = value_types.Count(_DEFAULT.queue)
    queue_per_user: value_types.Count = value_types.Count(_DEFAULT.queue_per_user)
    inspections: value_types.Count = value_types.Count(_DEFAULT.inspections)
    inspections_per_user: value_types.Count = value_types.Count(_DEFAULT.inspections_per_user)
    connections: value_types.Count = value_types.Count(_DEFAULT.connections)
    connections_per_user: value_types.Count = value_types.Count(_DEFAULT.connections_per_user)
    virtual_size: value_types.Size = value_types.Size(_DEFAULT.virtual_size_bytes)
    memory: value_types.Size = value_types.Size(_DEFAULT.memory_bytes)
    stall: value_types.Duration = value_types.Duration(_DEFAULT.stall_seconds)
    duration: value_types.Duration = value_types.Duration(_DEFAULT.duration_seconds)
    inspect: value_types.Duration = value_types.Duration(_DEFAULT.inspect_seconds)
    stop_grace: value_types.Duration = value_types.Duration(30)


class OperatorsTable(_Table, frozen=True):
    """[operators]. No user, if it is left out."""

    users: tuple[value_types.Account, ...] = ()
    groups: tuple[value_types.Account, ...] = ()


class RootTable(_Table, frozen=True):
    """[roots.NAME]. None is a key that was left out."""

    path: value_types.AbsolutePath
    access: Literal["daemon", "caller"]
    kind: Literal["files", "block"] = "files"
    owner: value_types.Ownership | None = None
    mode: value_types.Mode | None = None
    mounts: bool | None = None
    allow_ownerless: bool | None = None
    allow_is_zero: bool | None = None
    parents_writable_by: tuple[value_types.Writer, ...] | None = None
    accept_damaged: bool = False
    reflink: bool | None = None

    @property
    def is_block(self) -> bool:
        """Whether it is of block devices."""
        return self.kind == "block"

    @property
    def owner_accounts(self) -> tuple[value_types.Account, value_types.Account] | None:
        """The user and the group that own what is created; None if that is the caller."""
        return self.owner.accounts if self.owner else None


class GrantTable(_Table, frozen=True, kw_only=True):
    """[[grants]]."""

    users: tuple[value_types.Account, ...] = ()
    groups: tuple[value_types.Account, ...] = ()
    read: tuple[str, ...]
    write: tuple[str, ...] = ()
    formats: tuple[value_types.WritableFormat, ...] | None = None
    read_formats: tuple[value_types.Format, ...] | None = None
    write_formats: tuple[value_types.WritableFormat, ...] | None = None
    overwrite: Literal["own", "any"] = "own"


class ServiceTable(_Table, frozen=True):
    """[service]. None is a key that was left out: no file of counters, no end when idle."""

    metrics: value_types.AbsolutePath | None = None
    idle_exit: value_types.Duration | None = None


class Document(_Table, frozen=True):
    """A policy that is right in itself; whether its names exist is not known yet."""

    limits: LimitsTable = LimitsTable()
    operators: OperatorsTable = OperatorsTable()
    roots: dict[str, RootTable] = {}
    grants: tuple[GrantTable, ...] = ()
    service: ServiceTable = ServiceTable()
    qemu_img: value_types.AbsolutePath = DEFAULT_QEMU_IMG

    @property
    def numbered_grants(self) -> tuple[tuple[str, GrantTable], ...]:
        """The grants, each with its key."""
        return tuple((f"grants[{number}]", grant) for number, grant in enumerate(self.grants))

    def parents_count(self, name: str) -> bool:
        """Whether it matters who else can write the directories above a root.

        It does where files are read with the daemon's rights: in the root itself, or in one around
        it, in which the files would lie if this one were renamed.
        """
        root = self.roots[name]
        return any(
            other.access == "daemon" and _is_within(root.path, other.path)
            for other in self.roots.values()
        )


class _File(Document, frozen=True):
    """One whose roots are not read yet: msgspec does not say in which of them a mistake is."""

    roots: dict[str, Any] = {}


def parse(text: str | bytes) -> Document:
    """Read a policy.

    Raises:
        PolicyError: it is not TOML, or not a policy. Nothing else is raised, whatever the text.
    """
    file = _decode(text)
    roots = {name: _root_of(name, table) for name, table in file.roots.items()}
    document = msgspec.structs.replace(file, roots=roots)
    _check_limits(document.limits)
    _check_service(document.service)
    _check_paths_differ(document.roots)
    _check_parents_count(document)
    for key, grant in document.numbered_grants:
        _check_grant(key, grant, document.roots)
    return document


def _decode(text: str | bytes) -> _File:
    try:
        return msgspec.toml.decode(text, type=_File, dec_hook=_value_of)
    except msgspec.ValidationError as error:
        raise _in_our_words("", error) from error
    except RecursionError as error:
        raise PolicyError("", "is nested too deeply") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise PolicyError("", f"is not TOML: {error}") from error


def _root_of(name: str, table: object) -> RootTable:
    key = f"roots.{name}"
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        reason = f"{name!r} is not a name: letters, digits, '-' and '_' make one"
        raise PolicyError("roots", reason)
    try:
        root = msgspec.convert(table, RootTable, dec_hook=_value_of)
    except msgspec.ValidationError as error:
        raise _in_our_words(key, error) from error
    _check_where(f"{key}.path", root)
    _check_effects(key, root)
    return root


def _value_of(kind: type[Any], value: object) -> object:
    """Read one of our own values, for msgspec."""
    return kind.of(value)


_REWORDED: Final = (
    (r"Object missing required field `(?P<key>.*)`", r"is missing"),
    (r"Object contains unknown field `(?P<key>.*)`", r"is not a key of the policy"),
    (r"Expected `object.*", r"must be a table"),
    (r"Expected `array.*", r"must be a list in brackets"),
    (r"Expected `str.*", r"must be a string in quotes"),
    (r"Expected `bool.*", r"must be true or false"),
    (r"Invalid enum value (.*)", r"\1 is not one of the values that are possible here"),
)
"""msgspec's messages, and ours."""


def _in_our_words(prefix: str, error: msgspec.ValidationError) -> PolicyError:
    """Turn `reason - at `$.a.b`` into a key and a reason."""
    reason, _, place = str(error).partition(" - at `$")
    keys = [prefix, place.removesuffix("`").removeprefix(".")]
    for pattern, words in _REWORDED:
        if match := re.fullmatch(pattern, reason):
            keys.append(match.groupdict().get("key", ""))
            reason = match.expand(words)
    return PolicyError(".".join(filter(None, keys)), reason)


# --- what can't be meant -----------------------------------------------------------------------


def _check_limits(limits: LimitsTable) -> None:
    for name, (least, most) in BOUNDS.items():
        value = getattr(limits, name)
        if not value.of(least) <= value <= value.of(most):
            raise PolicyError(f"limits.{name}", f"must be from {least} to {most}")


def _check_service(service: ServiceTable) -> None:
    if service.idle_exit is not None and service.idle_exit < 1:
        raise PolicyError("service.idle_exit", "must be at least 1 s")


def _check_where(key: str, root: RootTable) -> None:
    """Hold a root against the places that must not, or must, be one."""
    if root.path in TOO_WIDE:
        raise PolicyError(key, f"{root.path} is too wide for a root; choose a directory in it")
    for tree in SYSTEM_TREES:
        if _is_within(root.path, tree):
            raise PolicyError(key, f"{root.path} is {tree} or lies in it, which no root may")
    in_dev = _is_within(root.path, "/dev")
    if root.is_block and not in_dev:
        raise PolicyError(key, f"{root.path} is not in /dev, where a root of block devices must be")
    if in_dev and not root.is_block:
        raise PolicyError(key, f"{root.path} is in /dev, where a root of files must not be")


def _check_effects(key: str, root: RootTable) -> None:
    """Refuse what would have no effect, and so would be a misunderstanding."""
    for_files = {
        "owner": root.owner,
        "mode": root.mode,
        "mounts": root.mounts,
        "allow_ownerless": root.allow_ownerless,
        "reflink": root.reflink,
    }
    for_devices = {"allow_is_zero": root.allow_is_zero}
    for name, value in (for_files if root.is_block else for_devices).items():
        if value is not None:
            raise PolicyError(f"{key}.{name}", f"has no meaning for a root of kind {root.kind}")
    if root.access == "caller" and root.owner_accounts:
        reason = 'must be "caller", as access is: what a caller creates is its own'
        raise PolicyError(f"{key}.owner", reason)


def _check_paths_differ(roots: Mapping[str, RootTable]) -> None:
    seen: dict[str, str] = {}
    for name, root in roots.items():
        if root.path in seen:
            raise PolicyError(f"roots.{name}.path", f"is that of roots.{seen[root.path]} too")
        seen[root.path] = name


def _check_parents_count(document: Document) -> None:
    """Refuse parents_writable_by where it has no effect. See Document.parents_count."""
    for name, root in document.roots.items():
        if root.parents_writable_by is not None and not document.parents_count(name):
            reason = 'has no meaning with access = "caller", but inside of a root of the daemon\'s'
            raise PolicyError(f"roots.{name}.parents_writable_by", reason)


def _check_grant(key: str, grant: GrantTable, roots: Mapping[str, RootTable]) -> None:
    if not grant.users and not grant.groups:
        raise PolicyError(f"{key}.users", "users or groups must name somebody")
    if not grant.read:
        raise PolicyError(f"{key}.read", "must name a root: nothing is converted from nowhere")
    for name, named in (("read", grant.read), ("write", grant.write)):
        for root in named:
            if root not in roots:
                raise PolicyError(f"{key}.{name}", f"there is no root {root!r}")
    _check_formats(key, grant)


def _check_formats(key: str, grant: GrantTable) -> None:
    for name in ("formats", "read_formats", "write_formats"):
        if getattr(grant, name) == ():
            raise PolicyError(f"{key}.{name}", "must name a format")
    if grant.formats and (grant.read_formats or grant.write_formats):
        raise PolicyError(f"{key}.formats", "can't be combined with read_formats and write_formats")


def _is_within(path: str, tree: str) -> bool:
    return f"{path}/".startswith(f"{tree}/")
