"""Grants as the policy gives them, for tests of what is done with one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Final

from convertd_daemon import model, policy

CALLER: Final = model.Peer(uid=1234, gid=1234, groups=frozenset({1300, 1400}), pid=1)
STRANGER: Final = model.Peer(uid=1666, gid=1666, groups=frozenset(), pid=1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """A policy of one rule: who may read and write all its roots, in every format.

    `hidden` are further roots, which it opens to nobody.
    """

    roots: tuple[model.Root, ...]
    hidden: tuple[model.Root, ...] = ()
    peer: model.Peer = CALLER
    overwrite: model.Overwrite = model.Overwrite.OWN
    read_formats: Iterable[str] = model.FORMATS
    limits: model.Limits = dataclasses.field(default_factory=model.Limits)

    @property
    def policy(self) -> policy.Policy:
        """The policy."""
        rule = policy.Rule(
            name="grants[0]",
            subjects=policy.Subjects(uids=frozenset({self.peer.uid})),
            read=self.roots,
            write=self.roots,
            read_formats=frozenset(self.read_formats),
            write_formats=model.WRITABLE_FORMATS,
            overwrite=self.overwrite,
        )
        return policy.Policy(
            limits=self.limits,
            operators=policy.Subjects(),
            roots=(*self.roots, *self.hidden),
            rules=(rule,),
            qemu_img="/usr/bin/qemu-img",
        )

    def convert(self, request: model.ConvertRequest) -> model.Grant:
        """Leave to convert, or the policy's refusal."""
        return policy.decide(self.policy, self.peer, request)

    def inspect(self, source: model.Source) -> model.InspectGrant:
        """Leave to look, or the policy's refusal."""
        asked = model.InspectRequest(source=source)
        return policy.decide_inspect(self.policy, self.peer, asked)

    def place(self, path: str) -> model.Place:
        """Where a path leads."""
        place = self.policy.place(path)
        assert place is not None
        return place


def files(path: object, **changes: object) -> model.Root:
    """A root of files, opened with the daemon's rights."""
    root = model.Root(name="images", path=str(path), access=model.Access.DAEMON)
    return dataclasses.replace(root, **changes)  # type: ignore[arg-type]


def devices(path: object, **changes: object) -> model.Root:
    """A root of block devices."""
    return files(path, name="volumes", kind=model.RootKind.BLOCK, **changes)


def request(
    source: object, dest: object, source_format: str = "raw", dest_format: str = "raw"
) -> model.ConvertRequest:
    """A request with nothing but the two ends."""
    return model.ConvertRequest(
        source=model.Source(path=str(source), format=source_format),
        dest=model.Dest(path=str(dest), format=dest_format),
    )


def to(asked: model.ConvertRequest, **changes: object) -> model.ConvertRequest:
    """The same request, with another destination."""
    return dataclasses.replace(asked, dest=dataclasses.replace(asked.dest, **changes))  # type: ignore[arg-type]
