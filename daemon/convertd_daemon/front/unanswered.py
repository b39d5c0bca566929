"""Limit how many requests of one user the broker has at once; the others wait here.

The broker handles requests in the order of arrival, and takes milliseconds to start a job. With 100
requests of one user ahead, others waited for 2 to 3 s (measured 2026-11).
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

AT_ONCE: Final = 4
"""Requests of one user that the broker has not replied to. Its first reply comes soon: refused,
queued, started, or the result."""


class Unanswered:
    """The requests without a reply, and those that wait, of all users."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        """Send encoded requests with `send`."""
        self._send = send
        self._asked: dict[int, int | None] = {}
        self._count: collections.Counter[int | None] = collections.Counter()
        self._waiting: dict[int | None, dict[int, bytes]] = {}

    def ask(self, uid: int | None, call: int, data: bytes) -> None:
        """Send a user's request, now or later. Unknown connections (None) count as one user."""
        if self._count[uid] < AT_ONCE:
            self._ask(uid, call, data)
        else:
            self._waiting.setdefault(uid, {})[call] = data

    def answered(self, call: int) -> None:
        """Record the broker's reply to a call, and send the user's next request."""
        if call not in self._asked:
            return
        uid = self._asked.pop(call)
        self._count[uid] -= 1
        waiting = self._waiting.get(uid)
        if waiting:
            first = next(iter(waiting))
            self._ask(uid, first, waiting.pop(first))
        if not waiting:
            self._waiting.pop(uid, None)
        if not self._count[uid]:
            del self._count[uid]

    def withdraw(self, uid: int | None, call: int) -> bool:
        """Drop a waiting request; False if it was sent."""
        return self._waiting.get(uid, {}).pop(call, None) is not None

    def _ask(self, uid: int | None, call: int, data: bytes) -> None:
        self._asked[call] = uid
        self._count[uid] += 1
        self._send(data)
