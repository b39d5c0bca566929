"""The policy file, from the disk to a Policy.

Fails closed: a file that others than root can change, itself or by a directory above it, is not
read. The file is opened once; what is checked is what was opened.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from convertd_daemon.policy import (
    bind,
    decide,
    document,
    lookup,
    path_walk,
    survey,
    writers,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from convertd_core import values

MAX_BYTES: Final = 1024 * 1024


class LoadError(Exception):
    """A policy that is not taken: the file, the key if it is about one, and the reason."""

    def __init__(self, file: str, key: str, reason: str) -> None:
        super().__init__(": ".join(filter(None, (file, key, reason))))
        self.file = file
        self.key = key
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A policy in force, the document it was made of, and what in that grants nothing."""

    file: str
    document: document.Document
    ids: bind.Ids
    policy: decide.Policy
    warnings: tuple[LoadError, ...]
    seen: Mapping[str, survey.Seen]


def load(path: str, *, limit_s: float = lookup.LIMIT_S) -> Loaded:
    """Read a policy and look its names up. A name that doesn't exist is a warning.

    Blocks for up to `limit_s` seconds, and forks.

    Raises:
        LoadError: the file can't be read or trusted, or is not a policy, or the names could not be
            looked up.
    """
    path = os.path.abspath(path)
    text = _read(path)
    try:
        parsed = document.parse(text)
        ids = lookup.resolve(bind.names_in(parsed), limit_s=limit_s)
        seen = survey.of(parsed.roots)
        bound = bind.bind(parsed, ids, survey.directories(seen))
    except document.PolicyError as error:
        raise LoadError(path, error.key, error.reason) from error
    except lookup.LookupFailed as error:
        raise LoadError(path, "", str(error)) from error
    except OSError as error:
        # No process to be had, or no descriptor: at a reload the policy in force stays.
        raise LoadError(path, "", f"can't be checked: {os.strerror(error.errno or 0)}") from error
    for root in bound.roots:
        if parsed.parents_count(root.name):
            _check_parents(path, root, seen[root.name])
    return Loaded(
        file=path,
        document=parsed,
        ids=ids,
        policy=bound,
        warnings=tuple(
            LoadError(path, missing.key, missing.reason)
            for missing in bind.missing_names(parsed, ids)
        ),
        seen=seen,
    )


def _check_parents(file: str, root: values.Root, seen: survey.Seen) -> None:
    """Refuse a root that a user whom the policy does not name could replace.

    Raises:
        LoadError: such a user could; it says what to write if that is intended.
    """
    beyond = [found for one in seen.writers if (found := one.beyond(root))]
    if not beyond:
        return
    first = beyond[0]
    reason = f"{first}, who could so replace {root.path}"
    if first.everybody and first.is_sticky:
        reason += "; it is not there: make it first"
    elif first.everybody:
        reason += f"; take that from them: chmod o-w {first.path}"
    else:
        uids = frozenset[int]().union(root.parent_uids, *(found.uids for found in beyond))
        gids = frozenset[int]().union(root.parent_gids, *(found.gids for found in beyond))
        named = [f"{uid}" for uid in sorted(uids)] + [f'"group:{gid}"' for gid in sorted(gids)]
        reason += f"; if that is meant, write: parents_writable_by = [{', '.join(named)}]"
    raise LoadError(file, f"roots.{root.name}.parents_writable_by", reason)


def _read(path: str) -> bytes:
    with _trusted(path) as fd, open(fd, "rb", closefd=False) as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise LoadError(path, "", f"is larger than {MAX_BYTES} bytes")
    return text


@contextlib.contextmanager
def _trusted(path: str) -> Iterator[int]:
    """Open a file that only root can change, replace or redirect.

    Every directory is opened below the one before, and none by a symbolic link, so what was checked
    is what is read.
    """
    with contextlib.ExitStack() as stack:
        try:
            *_, last = _checked(path, path_walk.steps(os.path.dirname(path), stack))
            # O_NONBLOCK: a FIFO must not make us wait for its writer.
            file = path_walk.open_step(last.fd, path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise LoadError(path, "", path_walk.reason(error)) from error
        stack.callback(os.close, file)
        found = path_walk.Step(path=path, fd=file, status=os.fstat(file))
        _check_roots_alone(path, found)
        if not stat.S_ISREG(found.status.st_mode):
            raise LoadError(path, "", "is not a regular file")
        yield file


def _checked(path: str, steps: Iterable[path_walk.Step]) -> Iterator[path_walk.Step]:
    for step in steps:
        _check_roots_alone(path, step)
        yield step


def _check_roots_alone(path: str, step: path_walk.Step) -> None:
    """Refuse what others than root can change. A sticky bit is no excuse."""
    try:
        others = writers.of(step)
    except OSError as error:
        raise LoadError(path, "", f"{step.path}: {os.strerror(error.errno or 0)}") from error
    if others:
        raise LoadError(path, "", str(others))
