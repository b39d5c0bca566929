"""What the directories of a policy's roots are, and who could replace them, as it is loaded.

A root can lie on storage that does not answer, and stat(2) has no time limit. So a forked child
walks to each root, and a root without an answer in time is left out; the others are not affected.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Final

from convertd_core import codec, values
from convertd_daemon.policy import bind, directory_identity, forked, path_walk, writers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from convertd_daemon.policy import document

PATIENCE_S: Final = 1.0
"""How long one root may take."""

LIMIT_S: Final = 5.0
"""How long all may take."""

SILENT: Final = errno.ETIMEDOUT
"""The error of a root that did not answer in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One root: the directories on its way, from `/` to its own, and who could replace them.

    `is_read_only` is about the mount that it is on. `error` is the errno that says why the way is
    not complete; 0 if it is.
    """

    way: tuple[values.DirectoryIdentity, ...] = ()
    writers: tuple[writers.Writers, ...] = ()
    is_read_only: bool = False
    error: int = 0

    @property
    def identity(self) -> values.DirectoryIdentity | None:
        """The root's own directory."""
        return None if self.error or not self.way else self.way[-1]


def of(
    roots: Mapping[str, document.RootTable], *, patience_s: float = PATIENCE_S
) -> dict[str, Seen]:
    """Walk to each root. Forks."""
    found: dict[str, Seen] = {}
    deadline = time.monotonic() + LIMIT_S
    while left := [name for name in roots if name not in found]:
        work = functools.partial(_survey_all, [roots[name] for name in left])
        with forked.answer(work, LIMIT_S) as answer:
            lines = _lines(answer, patience_s, deadline)
            found.update(zip(left, (codec.decode(line, Seen) for line in lines), strict=False))
        # The first root without an answer is the one that blocks.
        silent = [name for name in left if name not in found]
        if time.monotonic() < deadline:
            silent = silent[:1]
        found.update(dict.fromkeys(silent, Seen(error=SILENT)))
    return found


def directories(seen: Mapping[str, Seen]) -> dict[str, bind.Directory]:
    """The directories that the roots are, each with the roots that are on its way, or are it."""
    return {
        name: bind.Directory(identity=one.identity, aliases=_aliases(name, seen))
        for name, one in seen.items()
        if one.identity is not None
    }


def _aliases(name: str, seen: Mapping[str, Seen]) -> frozenset[str]:
    return frozenset(
        other
        for other, of_other in seen.items()
        if other != name
        and of_other.identity is not None
        and any(of_other.identity.is_same(step) for step in seen[name].way)
    )


def _survey_all(roots: Iterable[document.RootTable], pipe: BinaryIO) -> None:
    for root in roots:
        pipe.write(codec.encode(_survey(root)) + b"\n")
        pipe.flush()


def _survey(root: document.RootTable) -> Seen:
    """Walk to one root, or as far as there is a way."""
    way: list[path_walk.Step] = []
    stopped = 0
    with contextlib.ExitStack() as stack:
        try:
            for step in path_walk.steps(root.path, stack):
                way.append(step)  # noqa: PERF402 - what was walked counts, though the rest fails
        except OSError as error:
            stopped = error.errno or errno.EIO
        try:
            return Seen(
                way=tuple(directory_identity.of(step.fd) for step in way),
                writers=tuple(filter(None, writers.above(root.path, way, is_block=root.is_block))),
                is_read_only=not stopped and _is_read_only(way[-1].fd),
                error=stopped,
            )
        except OSError as error:
            return Seen(error=error.errno or errno.EIO)


def _is_read_only(fd: int) -> bool:
    """Whether a directory is on a mount that can't be written."""
    return bool(os.fstatvfs(fd).f_flag & os.ST_RDONLY)


def _lines(answer: int, patience_s: float, deadline: float) -> Iterator[bytes]:
    """The lines of the child, until one takes too long."""
    poller = select.poll()
    poller.register(answer, select.POLLIN)
    data = b""
    while True:
        wait_s = min(patience_s, deadline - time.monotonic())
        if not poller.poll(max(0.0, wait_s) * 1000) or not (more := os.read(answer, 65536)):
            return
        *lines, data = (data + more).split(b"\n")
        yield from lines
