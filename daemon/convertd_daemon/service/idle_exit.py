"""Exit when the daemon is idle. Off unless the policy sets it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from convertd_daemon.loop import Loop, Timer

log = logging.getLogger(__name__)

CHECKS: Final = 4
"""How often within the limit the daemon checks whether it is idle."""


class Idle:
    """Calls a function when the daemon has been idle for a while.

    Work that begins and ends between two checks is not seen: then the daemon exits a little early,
    and the socket starts it again. No caller is lost: new connections wait in the socket's queue.
    """

    def __init__(self, loop: Loop, on_idle: Callable[[], None]) -> None:
        self._loop = loop
        self._on_idle = on_idle
        self._timer: Timer | None = None
        self._busy_at = 0.0

    def watch(self, limit_s: float, is_idle: Callable[[], bool]) -> None:
        """Start again, with another limit; 0 means never."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._busy_at = time.monotonic()
        if limit_s:
            self._check(limit_s, is_idle)

    def _check(self, limit_s: float, is_idle: Callable[[], bool]) -> None:
        now = time.monotonic()
        if not is_idle():
            self._busy_at = now
        if now - self._busy_at >= limit_s:
            log.info("idle for %g s", limit_s)
            self._on_idle()
            return
        self._timer = self._loop.after(limit_s / CHECKS, lambda: self._check(limit_s, is_idle))
