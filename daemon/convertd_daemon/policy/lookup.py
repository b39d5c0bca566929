"""Look up the ids of users and groups in a child, which can be killed if it blocks.

A name can lead to a directory service that doesn't answer, and getpwnam(3) has no time limit. So a
forked child looks them up, and the broker waits for a limited time.
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import select
import time
from typing import TYPE_CHECKING, BinaryIO, Final

from convertd_daemon.policy import bind, forked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LIMIT_S: Final = 5.0


class LookupFailed(Exception):
    """The names could not be looked up; nothing is known of any of them."""


def resolve(wanted: bind.NeededNames, *, limit_s: float = LIMIT_S) -> bind.Ids:
    """Ask the system for the ids of names. One that doesn't exist has none in the answer.

    Blocks for up to `limit_s` seconds. Call it from a process without threads, for it forks.

    Raises:
        LookupFailed: there was no answer in time, or the lookup broke.
    """
    with forked.answer(lambda pipe: _answer(pipe, wanted), limit_s) as answer:
        text = _read_all(answer, time.monotonic() + limit_s)
    try:
        found = json.loads(text)
    except ValueError:
        raise LookupFailed("the lookup of users and groups broke off") from None
    return bind.Ids(users=found["users"], groups=found["groups"])


def _answer(pipe: BinaryIO, wanted: bind.NeededNames) -> None:
    """Look the names up and write them down: all that the child does."""
    found = {
        "users": _ids(wanted.users, lambda name: pwd.getpwnam(name).pw_uid),
        "groups": _ids(wanted.groups, lambda name: grp.getgrnam(name).gr_gid),
    }
    pipe.write(json.dumps(found).encode())


def _ids(names: Iterable[str], look_up: Callable[[str], int]) -> dict[str, int]:
    found = {}
    for name in names:
        with contextlib.suppress(KeyError):
            found[name] = look_up(name)
    return found


def _read_all(reader: int, deadline: float) -> bytes:
    """Read until the other end is closed."""
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    data = b""
    while poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        if not (more := os.read(reader, 65536)):
            return data
        data += more
    raise LookupFailed("users and groups could not be looked up in time")
