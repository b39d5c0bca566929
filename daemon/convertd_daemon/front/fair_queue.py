"""Whose bytes go on next: users in turn, and no faster than gRPC takes their calls up.

gRPC takes calls up in the order in which they come, and the loop serves all connections in each
round. With 48 connections of others that sent calls as fast as they could, a round took a second,
and whoever else called waited half a minute (measured 2026-11).
"""

from __future__ import annotations

import asyncio
import collections
from typing import Final

AHEAD: Final = 8
"""So many calls may wait to be taken up."""

LOST_S: Final = 0.05
"""Calls that are not taken up for so long never will be: refused by gRPC, or taken back."""


class FairQueue:
    """A turn that goes round among the users who wait for it."""

    def __init__(self) -> None:
        """Nobody has it."""
        self._waiting: dict[int, collections.deque[asyncio.Future[None]]] = {}
        self._is_taken = False
        self._ahead = 0
        self._held: asyncio.TimerHandle | None = None

    async def take(self, uid: int) -> None:
        """Wait for a turn of this user's, which lasts until the next round of the loop."""
        if self._is_taken:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(uid, collections.deque()).append(turn)
            await turn
        else:
            self._is_taken = True
            asyncio.get_running_loop().call_soon(self._pass_on)

    def add(self, calls: int) -> None:
        """Take note that whoever has the turn sends so many calls."""
        self._ahead += calls

    def taken_up(self) -> None:
        """Gather that gRPC has taken up a call."""
        self._ahead = max(self._ahead - 1, 0)
        if self._held is not None:
            self._held.cancel()
            self._go_on()

    def _give_up(self) -> None:
        self._ahead = 0
        self._go_on()

    def _go_on(self) -> None:
        self._held = None
        self._pass_on()

    def _pass_on(self) -> None:
        """Give the turn to whoever had it longest ago, and so on in the next round."""
        loop = asyncio.get_running_loop()
        if self._ahead >= AHEAD:
            self._held = loop.call_later(LOST_S, self._give_up)
            return
        while self._waiting:
            uid = next(iter(self._waiting))
            line = self._waiting.pop(uid)
            turn = line.popleft()
            while line and turn.done():  # whoever waited is gone
                turn = line.popleft()
            if line:
                self._waiting[uid] = line
            if not turn.done():
                turn.set_result(None)
                loop.call_soon(self._pass_on)
                return
        self._is_taken = False
