"""Explain a policy: who may do what, and with whose rights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convertd_core import values
from convertd_daemon.policy import bind, decide, document, value_types

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from convertd_daemon.policy import load


def of(loaded: load.Loaded) -> Iterator[str]:
    """Explain a policy, line by line."""
    yield f"{loaded.file}:"
    yield from _section("Roots", map(_root, loaded.policy.roots))
    grants = zip(loaded.document.grants, loaded.policy.rules, strict=True)
    yield from _section("Grants", (_grant(table, rule, loaded.ids) for table, rule in grants))
    yield from _section("Operators", [_operators(loaded.document.operators, loaded.ids)])
    yield from _section("Limits, at most", ([line] for line in _limits(loaded.policy)))
    yield from _section("Service", [list(_service(loaded.policy.service))])
    yield from _section("Program", [[loaded.policy.qemu_img]])


def _service(service: values.Service) -> Iterator[str]:
    yield f"counters: {service.metrics or 'no file'}"
    idle = service.idle_exit_s
    yield f"ends after {_time(idle)} without work" if idle else "keeps running without work"


def _section(title: str, entries: Iterable[list[str]]) -> Iterator[str]:
    yield ""
    yield title
    for first, *rest in list(entries) or [["none: nobody may convert anything"]]:
        yield f"  {first}"
        yield from (f"    {line}" for line in rest)


def _root(root: values.Root) -> list[str]:
    what = {values.RootKind.FILE: "image files", values.RootKind.BLOCK: "block devices"}
    lines = [f"{root.name}: {what[root.kind]} in {root.path}"]
    if root.access is values.RootAccess.CALLER:
        lines.append("The daemon opens them with the caller's rights.")
    else:
        lines.append("The daemon opens them with its own rights, whoever owns them.")
        lines += _parents(root)
    if root.accept_damaged:
        lines.append("Damaged images are read if the caller accepts that.")
    if root.kind is values.RootKind.BLOCK:
        belief = "believes" if root.allow_is_zero else "does not believe"
        return [
            *lines,
            "Nothing is created here.",
            f"The daemon {belief} a caller who says that a device reads as zeroes.",
        ]
    owner = f"uid {root.owner.uid}, gid {root.owner.gid}" if root.owner else "the caller"
    mounts = "can" if root.mounts else "can't"
    shared = "can" if root.reflink else "can't"
    made = "files are created with a warning" if root.allow_ownerless else "nothing is created"
    return [
        *lines,
        f"Created files belong to {owner}, mode {root.mode:04o} unless the request says otherwise.",
        f"What is mounted below {mounts} be used.",
        f"Where the file system keeps no owner or mode, {made}.",
        f"Results {shared} share blocks with their sources.",
    ]


def _parents(root: values.Root) -> list[str]:
    """Who, beside root, could put something else in the place of a root."""
    named = [f"uid {uid}" for uid in sorted(root.parent_uids)]
    named += [f"any member of gid {gid}" for gid in sorted(root.parent_gids)]
    return [f"The directories above can be changed by {' or '.join(named)}."] if named else []


def _grant(table: document.GrantTable, rule: decide.Rule, ids: bind.Ids) -> list[str]:
    overwrite = {
        values.OverwriteScope.OWN: "its own files",
        values.OverwriteScope.ANY: "any existing file",
    }
    lines = [
        f"{rule.name}: {_subjects(table, ids)} may",
        f"read {_listed(rule.read_formats)} in {_names(rule.read)}",
    ]
    if not rule.write:
        return [*lines, "write nothing: it may inspect images, but not convert them."]
    lines.append(f"write {_listed(rule.write_formats)} in {_names(rule.write)}")
    return [*lines, f"replace {overwrite[rule.overwrite]}, if the request asks for it."]


def _operators(table: document.OperatorsTable, ids: bind.Ids) -> list[str]:
    if not table.users and not table.groups:
        return ["nobody: each caller sees and cancels its own jobs only."]
    who = _subjects(table, ids)
    return [f"{who} may see and cancel every job. This gives no right to convert."]


def _subjects(table: document.OperatorsTable | document.GrantTable, ids: bind.Ids) -> str:
    users = [_account(bind.Kind.USER, user, ids) for user in table.users]
    groups = [_account(bind.Kind.GROUP, group, ids) for group in table.groups]
    return " or ".join(users + [f"any member of {group}" for group in groups])


def _account(kind: bind.Kind, account: value_types.Account, ids: bind.Ids) -> str:
    short = {bind.Kind.USER: "uid", bind.Kind.GROUP: "gid"}[kind]
    if account.number is not None:
        return f"{short} {account}"
    number = ids.of(kind, account)
    known = "which does not exist" if number is None else f"{short} {number}"
    return f"{kind} {account} ({known})"


def _limits(policy: decide.Policy) -> Iterator[str]:
    limits = policy.limits
    yield f"{limits.jobs} conversions at once, {limits.jobs_per_user} of one user"
    yield f"{limits.queue} conversions that wait, {limits.queue_per_user} of one user"
    yield f"{limits.inspections} inspections at once, {limits.inspections_per_user} of one user"
    yield f"{_time(limits.inspect_seconds)} for an inspection"
    yield f"{limits.connections} connections, {limits.connections_per_user} of one user"
    yield f"{_size(limits.virtual_size_bytes)} of virtual size"
    yield f"{_size(limits.memory_bytes)} of memory for qemu-img"
    yield f"{_time(limits.stall_seconds)} without progress, {_time(limits.duration_seconds)} in all"
    yield f"{_time(policy.service.stop_grace_s)} for running jobs when the daemon is stopped"


def _listed(texts: Iterable[str]) -> str:
    return ", ".join(sorted(texts))


def _names(roots: tuple[values.Root, ...]) -> str:
    return ", ".join(root.name for root in roots) or "no root that can be used"


def _size(size_bytes: int) -> str:
    return _in_units(size_bytes, value_types.SIZE_UNITS)


def _time(time_s: float) -> str:
    return _in_units(time_s, value_types.TIME_UNITS)


def _in_units(amount: float, units: dict[str, int]) -> str:
    """Write a quantity in the largest unit that leaves no fraction, else in the smallest."""
    fitting = [unit for unit, size in units.items() if amount and amount % size == 0]
    unit = (fitting or list(units))[-1 if fitting else 0]
    return f"{amount / units[unit]:.12g} {unit}"
