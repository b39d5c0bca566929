"""Whose bytes go on next: users in turn, one of them each round of the loop.

gRPC takes calls in the order in which they come, and the loop serves all connections in each round.
With 48 connections of others that sent calls as fast as they could, a round took a second, and
whoever else called waited half a minute (measured 2026-11).
"""

from __future__ import annotations

import asyncio
import collections


class Turns:
    """A turn that goes round among the users who wait for it."""

    def __init__(self) -> None:
        """Nobody has it."""
        self._waiting: dict[int, collections.deque[asyncio.Future[None]]] = {}
        self._is_taken = False

    async def take(self, uid: int) -> None:
        """Wait for a turn of this user's, which lasts until the next round of the loop."""
        loop = asyncio.get_running_loop()
        if not self._is_taken:
            self._is_taken = True
            loop.call_soon(self._pass_on)
            return
        turn = loop.create_future()
        self._waiting.setdefault(uid, collections.deque()).append(turn)
        await turn

    def _pass_on(self) -> None:
        """Give the turn to whoever had it longest ago, and so on in the next round."""
        while self._waiting:
            uid, line = next(iter(self._waiting.items()))
            turn = line.popleft()
            if turn.done():  # whoever waited is gone
                if not line:
                    del self._waiting[uid]
                continue
            turn.set_result(None)
            del self._waiting[uid]
            if line:
                self._waiting[uid] = line
            asyncio.get_running_loop().call_soon(self._pass_on)
            return
        self._is_taken = False
