"""Who may convert what. Fails closed: what no rule allows is refused.

Pure: a policy, a caller and a request go in, a Grant or a refusal comes out. So the answer is the
same whether or not a path exists, and a refused caller learns nothing but what it wrote itself.

Three things hold, and the tests hold them:

- One rule must allow all of a request. Two rules are never combined.
- Of the roots that contain a path, the longest is the only one asked, whichever rules name it.
- The first rule that allows a request is the one that counts. If the request leaves the source's
  format open, that choice is made without it: the format is held against the same rule once it is
  known, and no second rule is tried. A caller for whom that matters states the format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from convertd_core import conditions, results, validation, values
from convertd_daemon.policy import places


@dataclass(frozen=True, slots=True, kw_only=True)
class Subjects:
    """The users that a rule is for: by uid, or by a group that they are in."""

    uids: frozenset[int] = frozenset()
    gids: frozenset[int] = frozenset()

    def include(self, peer: values.Peer) -> bool:
        """Whether the caller is one of them.

        A caller whose uid our user namespace doesn't map has no identity, and is never one.
        """
        if peer.uid == values.OVERFLOW_ID:
            return False
        groups = (peer.groups | {peer.gid}) - {values.OVERFLOW_ID}
        return peer.uid in self.uids or not self.gids.isdisjoint(groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One grant of the policy file: who may read where, write where, and in which formats."""

    name: str
    subjects: Subjects
    read: tuple[values.Root, ...]
    write: tuple[values.Root, ...]
    read_formats: frozenset[str]
    write_formats: frozenset[str]
    overwrite: values.OverwriteScope

    def may_read(self, place: values.Place, format_name: str) -> bool:
        """Whether an image may be read there; an empty format is one that is still unknown."""
        return place.root in self.read and (not format_name or format_name in self.read_formats)

    def may_write(self, place: values.Place, format_name: str) -> bool:
        """Whether an image of that format may be written there."""
        return place.root in self.write and format_name in self.write_formats


DEFAULT_SERVICE: Final = values.Service()


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The policy of the file, with every name resolved.

    `roots` are all of them, also those that no rule names: they still hide what lies below from
    the roots around them.
    """

    limits: values.Limits
    operators: Subjects
    roots: tuple[values.Root, ...]
    rules: tuple[Rule, ...]
    qemu_img: str
    service: values.Service = DEFAULT_SERVICE

    def place(self, path: str) -> values.Place | None:
        """Find the root that decides about a path. See places.place_of."""
        return places.place_of(path, self.roots)

    @property
    def gids(self) -> frozenset[int]:
        """The groups that anything depends on."""
        return self.operators.gids.union(*(rule.subjects.gids for rule in self.rules))

    def rules_for(self, peer: values.Peer) -> tuple[Rule, ...]:
        """The rules that are for this caller, in the file's order."""
        return tuple(rule for rule in self.rules if rule.subjects.include(peer))

    def closed_to(self, rule: Rule) -> tuple[values.Root, ...]:
        """The roots that a rule does not let its users read."""
        return tuple(root for root in self.roots if root not in rule.read)


def decide(
    policy: Policy, peer: values.Peer, request: values.ConvertRequest
) -> values.ConvertGrant:
    """Grant a conversion, by the first rule that allows both source and destination.

    Raises:
        conditions.BadPath, conditions.BadFormat, conditions.BadOption: the request is invalid.
        conditions.PermissionDenied: no rule allows it.
        conditions.ClaimNotAllowed: one does, but not that `is_zero` is claimed.
    """
    request = validation.checked_convert(request)
    source = policy.place(request.source.path)
    dest = policy.place(request.dest.path)
    if source and dest:
        for rule in policy.rules_for(peer):
            reads = rule.may_read(source, request.source.format)
            if reads and rule.may_write(dest, request.dest.format):
                _check_device_options(request.dest, dest)
                return values.ConvertGrant(
                    rule=rule.name,
                    peer=peer,
                    request=request,
                    source=source,
                    dest=dest,
                    readable=rule.read,
                    closed=policy.closed_to(rule),
                    read_formats=rule.read_formats,
                    overwrite=rule.overwrite,
                    limits=policy.limits,
                )
    source_text = _quoted(request.source.path, request.source.format)
    dest_text = _quoted(request.dest.path, request.dest.format)
    raise conditions.PermissionDenied(uid=peer.uid, action=f"convert {source_text} to {dest_text}")


def _check_device_options(asked: values.Destination, dest: values.Place) -> None:
    """Refuse options that do not fit the kind of the destination's root."""
    if asked.mode is not None and dest.root.kind is values.RootKind.BLOCK:
        raise conditions.BadOption(field="dest.mode", problem="is for files only")
    if not asked.is_zero:
        return
    if dest.root.kind is not values.RootKind.BLOCK:
        raise conditions.BadOption(field="dest.is_zero", problem="is for devices only")
    if not dest.root.allow_is_zero:
        raise conditions.ClaimNotAllowed(path=validation.shown(dest.path))


def decide_inspect(
    policy: Policy, peer: values.Peer, request: values.InspectRequest
) -> values.InspectGrant:
    """Grant an inspection, by the first rule that allows reading the image.

    Raises:
        conditions.BadPath, conditions.BadFormat: the request is invalid.
        conditions.PermissionDenied: no rule allows it.
    """
    request = validation.checked_inspect(request)
    source = policy.place(request.source.path)
    if source:
        for rule in policy.rules_for(peer):
            if rule.may_read(source, request.source.format):
                return values.InspectGrant(
                    rule=rule.name,
                    peer=peer,
                    request=request,
                    source=source,
                    readable=rule.read,
                    closed=policy.closed_to(rule),
                    read_formats=rule.read_formats,
                    limits=policy.limits,
                )
    image = _quoted(request.source.path, request.source.format)
    raise conditions.PermissionDenied(uid=peer.uid, action=f"inspect {image}")


def is_operator(policy: Policy, peer: values.Peer) -> bool:
    """Whether the caller may see and cancel every job."""
    return policy.operators.include(peer)


def grants_of(policy: Policy, peer: values.Peer) -> tuple[results.Grant, ...]:
    """The rules for this caller, in the order in which they are tried, as GetAccess shows them."""
    return tuple(_shown(rule) for rule in policy.rules_for(peer))


def _shown(rule: Rule) -> results.Grant:
    return results.Grant(
        rule=rule.name,
        roots=tuple(
            results.GrantedRoot(
                name=root.name,
                path=root.path,
                kind=root.kind,
                access=root.access or values.RootAccess.UNSPECIFIED,
                may_read=root in rule.read,
                may_write=root in rule.write,
                allow_is_zero=root.allow_is_zero,
            )
            for root in dict.fromkeys(rule.read + rule.write)
        ),
        read_formats=tuple(sorted(rule.read_formats)),
        write_formats=tuple(sorted(rule.write_formats)),
        overwrite=rule.overwrite,
    )


def _quoted(path: str, format_name: str) -> str:
    quoted = repr(validation.shown(path))
    return f"{quoted} ({format_name})" if format_name else quoted
