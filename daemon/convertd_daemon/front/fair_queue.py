"""A fair queue: users in turn send bytes to gRPC, no faster than gRPC accepts their calls.

gRPC accepts calls in the order of arrival, and the event loop serves all connections in each
iteration. With 48 connections of one user that sent calls as fast as they could, an iteration took
a second, and a call of another user waited half a minute (measured 2026-11).
"""

from __future__ import annotations

import asyncio
import collections
from typing import Final

AHEAD: Final = 8
"""Calls that were sent to gRPC and that it has not yet accepted."""

LOST_S: Final = 0.05
"""A call that gRPC has not accepted for so long never will be: gRPC refused it, or the peer
cancelled it."""


class FairQueue:
    """One turn, which the waiting users get one after the other."""

    def __init__(self) -> None:
        self._waiting: dict[int, collections.deque[asyncio.Future[None]]] = {}
        self._is_taken = False
        self._ahead = 0
        self._timer: asyncio.TimerHandle | None = None

    async def take(self, uid: int) -> None:
        """Wait for this user's turn, which lasts until the next iteration of the loop."""
        if self._is_taken:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(uid, collections.deque()).append(turn)
            await turn
        else:
            self._is_taken = True
            asyncio.get_running_loop().call_soon(self._pass_on)

    def add(self, calls: int) -> None:
        """Count calls that are being sent to gRPC in the current turn."""
        self._ahead += calls

    def on_call_accepted(self) -> None:
        """Count that gRPC has accepted a call."""
        self._ahead = max(self._ahead - 1, 0)
        if self._timer is not None:
            self._timer.cancel()
            self._resume()

    def _forget_lost(self) -> None:
        self._ahead = 0
        self._resume()

    def _resume(self) -> None:
        self._timer = None
        self._pass_on()

    def _pass_on(self) -> None:
        """Give the turn to the user who had it longest ago; repeat in the next iteration."""
        loop = asyncio.get_running_loop()
        if self._ahead >= AHEAD:
            self._timer = loop.call_later(LOST_S, self._forget_lost)
            return
        while self._waiting:
            uid = next(iter(self._waiting))
            queue = self._waiting.pop(uid)
            turn = queue.popleft()
            while queue and turn.done():  # cancelled: its connection is gone
                turn = queue.popleft()
            if queue:
                self._waiting[uid] = queue
            if not turn.done():
                turn.set_result(None)
                loop.call_soon(self._pass_on)
                return
        self._is_taken = False
