"""From names to ids: a Document becomes a Policy.

Pure: the caller passes the ids, and what the roots are. Fails closed: a name without an id grants
nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from convertd_core import values
from convertd_daemon.policy import decide, document, value_types

_NOT_SURVEYED: Final[Mapping[str, Directory]] = {}


class Kind(enum.StrEnum):
    """What a name is the name of."""

    USER = "user"
    GROUP = "group"


@dataclass(frozen=True, slots=True, kw_only=True)
class NeededNames:
    """Names whose ids must be looked up."""

    users: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ids:
    """The ids of names. A name that is not in here does not exist."""

    users: Mapping[str, int]
    groups: Mapping[str, int]

    def of(self, kind: Kind, account: value_types.Account) -> int | None:
        """The uid or gid of an account, None if there is no such account."""
        if account.number is not None:
            return account.number
        return (self.users if kind is Kind.USER else self.groups).get(account)


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """What a root was when the policy was loaded. See values.Root."""

    identity: values.DirectoryIdentity
    aliases: frozenset[str] = frozenset()


def names_in(parsed: document.Document) -> NeededNames:
    """The names that a policy mentions."""
    named = [(kind, account) for _, kind, account in _mentions(parsed) if account.number is None]
    return NeededNames(
        users=frozenset(account for kind, account in named if kind is Kind.USER),
        groups=frozenset(account for kind, account in named if kind is Kind.GROUP),
    )


def missing_names(parsed: document.Document, ids: Ids) -> tuple[document.PolicyError, ...]:
    """The names that a policy mentions and the system doesn't know: mistakes, each with its key."""
    return tuple(
        document.PolicyError(key, f"there is no {kind} {account}")
        for key, kind, account in _mentions(parsed)
        if ids.of(kind, account) is None
    )


def bind(
    parsed: document.Document, ids: Ids, directories: Mapping[str, Directory] = _NOT_SURVEYED
) -> decide.Policy:
    """Make a Policy, in which a name that doesn't exist grants nothing.

    A user or group that doesn't exist is left out. A root whose owner doesn't exist is left out of
    every rule: what would be created there would have no owner. `directories` are those that
    the roots are, by their names; a root that is not in there was not there.

    Raises:
        document.PolicyError: a name has an id that is not allowed.
    """
    _check_ids(parsed, ids)
    roots = {
        name: _root(name, table, ids, directories.get(name)) for name, table in parsed.roots.items()
    }
    usable = {
        name: root
        for name, root in roots.items()
        if root.owner or not parsed.roots[name].owner_accounts
    }
    return decide.Policy(
        limits=_limits(parsed.limits),
        operators=_subjects(parsed.operators, ids),
        roots=tuple(roots.values()),
        rules=tuple(_rule(key, grant, usable, ids) for key, grant in parsed.numbered_grants),
        qemu_img=parsed.qemu_img,
        service=values.Service(
            metrics=parsed.service.metrics or "",
            idle_exit_s=parsed.service.idle_exit or 0.0,
            stop_grace_s=parsed.limits.stop_grace,
        ),
    )


def _mentions(parsed: document.Document) -> Iterator[tuple[str, Kind, value_types.Account]]:
    """Every user and group that a policy mentions, with its key."""
    tables: list[tuple[str, document.OperatorsTable | document.GrantTable]]
    tables = [("operators", parsed.operators), *parsed.numbered_grants]
    for key, table in tables:
        for kind, accounts in ((Kind.USER, table.users), (Kind.GROUP, table.groups)):
            for number, account in enumerate(accounts):
                yield f"{key}.{kind}s[{number}]", kind, account
    for name, root in parsed.roots.items():
        for kind, account in zip(Kind, root.owner_accounts or (), strict=False):
            yield f"roots.{name}.owner", kind, account
        for number, writer in enumerate(root.parents_writable_by or ()):
            kind = Kind.GROUP if writer.is_group else Kind.USER
            yield f"roots.{name}.parents_writable_by[{number}]", kind, writer.account


def _check_ids(parsed: document.Document, ids: Ids) -> None:
    """Refuse a name whose id, as the system gave it, the policy couldn't have stated."""
    for key, kind, account in _mentions(parsed):
        try:
            value_types.check_id(ids.of(kind, account) or 0)
        except ValueError as error:
            raise document.PolicyError(key, str(error)) from error


def _root(
    name: str, table: document.RootTable, ids: Ids, directory: Directory | None
) -> values.Root:
    return values.Root(
        name=name,
        path=table.path,
        kind=values.RootKind.BLOCK if table.is_block else values.RootKind.FILE,
        access=values.RootAccess(table.access),
        owner=_owner(table, ids),
        mode=document.DEFAULT_MODE if table.mode is None else table.mode,
        mounts=bool(table.mounts),
        allow_ownerless=bool(table.allow_ownerless),
        allow_is_zero=bool(table.allow_is_zero),
        parent_uids=_parents(table, ids, Kind.USER),
        parent_gids=_parents(table, ids, Kind.GROUP),
        identity=directory.identity if directory else None,
        aliases=directory.aliases if directory else frozenset(),
        accept_damaged=table.accept_damaged,
        reflink=table.reflink is not False,
    )


def _parents(table: document.RootTable, ids: Ids, kind: Kind) -> frozenset[int]:
    """The users, or the groups, who may be able to write the directories above a root."""
    named = table.parents_writable_by or ()
    found = (
        ids.of(kind, writer.account) for writer in named if writer.is_group is (kind is Kind.GROUP)
    )
    return frozenset(number for number in found if number is not None)


def _owner(table: document.RootTable, ids: Ids) -> values.Owner | None:
    """Whose the files of a root are; None for the caller's, and for an owner that doesn't exist."""
    if not table.owner_accounts:
        return None
    user, group = table.owner_accounts
    uid, gid = ids.of(Kind.USER, user), ids.of(Kind.GROUP, group)
    return None if uid is None or gid is None else values.Owner(uid=uid, gid=gid)


def _subjects(table: document.OperatorsTable | document.GrantTable, ids: Ids) -> decide.Subjects:
    uids = (ids.of(Kind.USER, user) for user in table.users)
    gids = (ids.of(Kind.GROUP, group) for group in table.groups)
    return decide.Subjects(
        uids=frozenset(uid for uid in uids if uid is not None),
        gids=frozenset(gid for gid in gids if gid is not None),
    )


def _rule(
    key: str, grant: document.GrantTable, usable: Mapping[str, values.Root], ids: Ids
) -> decide.Rule:
    formats = grant.formats or document.DEFAULT_FORMATS
    return decide.Rule(
        name=key,
        subjects=_subjects(grant, ids),
        read=tuple(usable[name] for name in grant.read if name in usable),
        write=tuple(usable[name] for name in grant.write if name in usable),
        read_formats=frozenset(grant.read_formats or formats),
        write_formats=frozenset(grant.write_formats or formats),
        overwrite=values.OverwriteScope(grant.overwrite),
    )


def _limits(table: document.LimitsTable) -> values.Limits:
    return values.Limits(
        jobs=table.jobs,
        jobs_per_user=table.jobs_per_user,
        queue=table.queue,
        queue_per_user=table.queue_per_user,
        inspections=table.inspections,
        inspections_per_user=table.inspections_per_user,
        connections=table.connections,
        connections_per_user=table.connections_per_user,
        virtual_size_bytes=table.virtual_size,
        memory_bytes=table.memory,
        stall_seconds=table.stall,
        duration_seconds=table.duration,
        inspect_seconds=table.inspect,
    )
