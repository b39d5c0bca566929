"""Grants as the policy gives them, for tests of what is done with one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Final

from convertd_core import results, values
from convertd_daemon.job import stages
from convertd_daemon.policy import decide

CALLER: Final = values.Peer(uid=1234, gid=1234, groups=frozenset({1300, 1400}), pid=1)
OTHER_USER: Final = values.Peer(uid=1666, gid=1666, groups=frozenset(), pid=1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """A policy of one rule: who may read and write all its roots, in every format.

    `hidden` are further roots, which it opens to nobody.
    """

    roots: tuple[values.Root, ...]
    hidden: tuple[values.Root, ...] = ()
    peer: values.Peer = CALLER
    overwrite: values.OverwriteScope = values.OverwriteScope.OWN
    read_formats: Iterable[str] = values.FORMATS
    limits: values.Limits = dataclasses.field(default=values.DEFAULT_LIMITS)

    @property
    def policy(self) -> decide.Policy:
        """The policy."""
        rule = decide.Rule(
            name="grants[0]",
            subjects=decide.Subjects(uids=frozenset({self.peer.uid})),
            read=self.roots,
            write=self.roots,
            read_formats=frozenset(self.read_formats),
            write_formats=values.WRITABLE_FORMATS,
            overwrite=self.overwrite,
        )
        return decide.Policy(
            limits=self.limits,
            operators=decide.Subjects(),
            roots=(*self.roots, *self.hidden),
            rules=(rule,),
            qemu_img="/usr/bin/qemu-img",
        )

    def convert(self, request: values.ConvertRequest) -> values.ConvertGrant:
        """Leave to convert, or the policy's refusal."""
        return decide.decide(self.policy, self.peer, request)

    def inspect(self, source: values.Source) -> values.InspectGrant:
        """Leave to look, or the policy's refusal."""
        asked = values.InspectRequest(source=source)
        return decide.decide_inspect(self.policy, self.peer, asked)

    def place(self, path: str) -> values.Place:
        """Where a path leads."""
        place = self.policy.place(path)
        assert place is not None
        return place


def limits(**changes: float) -> values.Limits:
    """The default limits, but for these."""
    return dataclasses.replace(values.DEFAULT_LIMITS, **changes)  # type: ignore[arg-type]


def files(path: object, **changes: object) -> values.Root:
    """A root of files, opened with the daemon's rights."""
    root = values.Root(name="images", path=str(path), access=values.RootAccess.DAEMON)
    return dataclasses.replace(root, **changes)  # type: ignore[arg-type]


def devices(path: object, **changes: object) -> values.Root:
    """A root of block devices."""
    return files(path, name="volumes", kind=values.RootKind.BLOCK, **changes)


def request(
    source: object, dest: object, source_format: str = "raw", dest_format: str = "raw"
) -> values.ConvertRequest:
    """A request with nothing but the two ends."""
    return values.ConvertRequest(
        source=values.Source(path=str(source), format=source_format),
        dest=values.Destination(path=str(dest), format=dest_format),
    )


def slowly(asked: values.ConvertRequest) -> values.ConvertRequest:
    """The same request, to be copied as slowly as can be: 1 MiB/s."""
    return dataclasses.replace(
        asked, rate_limit_bytes_per_second=values.MIB, reflink=values.Reflink.NEVER
    )


def to(asked: values.ConvertRequest, **changes: object) -> values.ConvertRequest:
    """The same request, with another destination."""
    return dataclasses.replace(asked, dest=dataclasses.replace(asked.dest, **changes))  # type: ignore[arg-type]


def plan_of(size_bytes: int, *, needed_bytes: int = 0) -> stages.ConversionPlan:
    """A plan for a raw image of that size, with nothing else in it that counts."""
    cache = results.CacheChoice(mode=values.CacheMode.NONE, reason="")
    return stages.ConversionPlan(
        source_format="raw",
        dest_format="raw",
        virtual_size_bytes=size_bytes,
        dest_cache=cache,
        source_cache=cache,
        command=(),
        chain=(),
        compression=values.Compression.NONE,
        needed_bytes=needed_bytes,
        available_bytes=0,
        method=results.Method.QEMU_IMG,
        method_reason="",
        argv=(),
    )
