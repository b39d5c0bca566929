"""Who, other than root, could replace what a path leads to. Fails closed."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convertd_daemon.linux import posix_acl

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convertd_core import values
    from convertd_daemon.policy import path_walk


@dataclass(frozen=True, slots=True, kw_only=True)
class Writers:
    """The users, other than root, who can change a file, or replace what is in a directory."""

    path: str
    uids: frozenset[int] = frozenset()
    gids: frozenset[int] = frozenset()
    everybody: bool = False
    is_sticky: bool = False

    def __bool__(self) -> bool:
        return self.everybody or bool(self.uids or self.gids)

    def beyond(self, root: values.Root) -> Writers:
        """Those of them that the policy does not name for that root."""
        return Writers(
            path=self.path,
            uids=self.uids - root.parent_uids,
            gids=self.gids - root.parent_gids,
            everybody=self.everybody,
            is_sticky=self.is_sticky,
        )

    def __str__(self) -> str:
        """Say it in a clause."""
        named = [f"uid {uid}" for uid in sorted(self.uids)]
        named += [f"members of gid {gid}" for gid in sorted(self.gids)]
        who = " and ".join(["everybody"] if self.everybody else named)
        return f"{self.path} can be changed by {who}"


def above(path: str, way: list[path_walk.Step], *, is_block: bool) -> Iterator[Writers]:
    """For each directory on the path of a root: who could replace the next one on the path.

    `way` may end before the root, if that is not there: then those count who could make what is
    missing. In a root of devices, where links are followed, those count who can write in it.

    Raises:
        OSError: an access control list could not be read.
    """
    for number, step in enumerate(way):
        below_uid = way[number + 1].status.st_uid if number + 1 < len(way) else None
        if below_uid is not None or step.path != path or is_block:
            yield of(step, below_uid)


def of(step: path_walk.Step, below_uid: int | None = None) -> Writers:
    """Who could change a file; or in a directory, replace what `below_uid` owns, or make a name.

    An owner can give itself every permission. In a sticky directory only its owner, and the owner
    of what is in it, can rename that. Source: inode(7), unlink(2).

    Raises:
        OSError: an access control list could not be read.
    """
    mode = step.status.st_mode
    uids, gids = {step.status.st_uid}, set[int]()
    everybody = False
    if below_uid is not None and mode & stat.S_ISVTX:
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            uids.add(below_uid)
    else:
        everybody = bool(mode & stat.S_IWOTH)
        if mode & stat.S_IWGRP:
            # With a list these bits are its mask, which limits all entries.
            listed = posix_acl.writers(step.fd)
            if listed is None or listed.owning_group:
                gids.add(step.status.st_gid)
            if listed is not None:
                uids |= listed.uids
                gids |= listed.gids
    return Writers(
        path=step.path,
        uids=frozenset(uids - {0}),
        gids=frozenset(gids),
        everybody=everybody,
        is_sticky=bool(mode & stat.S_ISVTX),
    )
