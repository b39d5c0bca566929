"""End when nobody needs the daemon. Off unless the policy says otherwise."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from convertd_daemon.broker.loop import Loop, Timer

LOOKS: Final = 4
"""So often in the time allowed it is looked whether there is something to do."""


class Idle:
    """Calls something when there has been nothing to do for a while.

    What begins and ends between two looks is overlooked: then the daemon ends a little early, and
    the socket starts it again. Nobody is lost: who connects meanwhile waits in the socket's queue.
    """

    def __init__(self, loop: Loop, on_idle: Callable[[], None]) -> None:
        """Watch nothing yet."""
        self._loop = loop
        self._on_idle = on_idle
        self._timer: Timer | None = None
        self._busy_at = 0.0

    def watch(self, limit_s: float, is_idle: Callable[[], bool]) -> None:
        """Begin anew, with another limit; 0 means never."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._busy_at = time.monotonic()
        if limit_s:
            self._look(limit_s, is_idle)

    def _look(self, limit_s: float, is_idle: Callable[[], bool]) -> None:
        now = time.monotonic()
        if not is_idle():
            self._busy_at = now
        if now - self._busy_at >= limit_s:
            self._on_idle()
            return
        self._timer = self._loop.after(limit_s / LOOKS, lambda: self._look(limit_s, is_idle))
