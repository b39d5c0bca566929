"""Policies, built in Python and written as an administrator writes them.

In a path {scratch}, {library} and {volumes} stand for directories that the fixture `fill_in` knows.
What isn't stated is left out of the text, so that the daemon's own default holds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Final

Accounts = Sequence[int | str]
"""Users or groups, by number or name."""


@dataclass(frozen=True, slots=True)
class Root:
    """[roots.NAME]."""

    name: str
    path: str
    _: KW_ONLY
    access: str = "daemon"
    kind: str | None = None
    owner: str | None = None
    mode: str | None = None
    mounts: bool | None = None
    allow_ownerless: bool | None = None
    allow_is_zero: bool | None = None
    parents_writable_by: Accounts | None = None
    accept_damaged: bool | None = None
    reflink: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """[[grants]]. For the user ALICE of harness.callers, if no other is stated."""

    users: Accounts | None = (1234,)
    groups: Accounts | None = None
    read: Sequence[Root]
    write: Sequence[Root] | None = None
    formats: Sequence[str] | None = None
    read_formats: Sequence[str] | None = None
    write_formats: Sequence[str] | None = None
    overwrite: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A policy file; `str` gives its text.

    It has the roots in `roots`, and then those that only its grants name.
    """

    grants: Sequence[Grant] = ()
    roots: Sequence[Root] = ()
    operators: Accounts | None = None
    limits: Mapping[str, int | str] = field(default_factory=dict)
    service: Mapping[str, str] = field(default_factory=dict)
    qemu_img: str | None = None

    def __str__(self) -> str:
        granted = [root for one in self.grants for root in (*one.read, *(one.write or ()))]
        roots = {root.name: root for root in (*self.roots, *granted)}
        return "".join(
            (
                _lines({"qemu_img": self.qemu_img}),
                _table("[limits]", self.limits),
                _table("[service]", self.service),
                _table("[operators]", {"users": self.operators}),
                *(_table(f"[roots.{name}]", _stated(root)) for name, root in roots.items()),
                *(_table("[[grants]]", _stated(grant)) for grant in self.grants),
            )
        )

    def with_limits(self, **limits: int | str) -> Policy:
        """The same with other limits."""
        return dataclasses.replace(self, limits={**self.limits, **limits})

    def for_users(self, *users: int | str) -> Policy:
        """The same with all grants given to these users."""
        grants = [dataclasses.replace(grant, users=users) for grant in self.grants]
        return dataclasses.replace(self, grants=grants)

    def with_root(self, root: Root) -> Policy:
        """The same with another root of that name."""

        def changed(roots: Sequence[Root]) -> list[Root]:
            return [root if one.name == root.name else one for one in roots]

        grants = [
            dataclasses.replace(
                grant, read=changed(grant.read), write=grant.write and changed(grant.write)
            )
            for grant in self.grants
        ]
        return dataclasses.replace(self, roots=changed(self.roots), grants=grants)


def _stated(table: Root | Grant) -> dict[str, object]:
    """The keys of a table; a root is named."""
    stated = {key.name: getattr(table, key.name) for key in dataclasses.fields(table)}
    if isinstance(table, Root):
        del stated["name"]
    return {
        key: [root.name for root in value] if value and key in {"read", "write"} else value
        for key, value in stated.items()
    }


def _table(header: str, table: Mapping[str, object]) -> str:
    lines = _lines(table)
    return f"{header}\n{lines}" if lines else ""


def _lines(table: Mapping[str, object]) -> str:
    """Keys with their values, as TOML: here it is as JSON."""
    return "".join(
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n"
        for key, value in table.items()
        if value is not None
    )


LIBRARY: Final = Root("library", "{library}")
"""Images that many tests read."""

IMAGES: Final = Root("images", "{scratch}/images")
"""Where most tests write."""

VOLUMES: Final = Root("volumes", "{volumes}", kind="block")
"""Block devices."""
