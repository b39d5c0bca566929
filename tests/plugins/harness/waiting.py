"""Wait for a fact, with a deadline. No test sleeps and hopes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

DEADLINE_S: Final = 60.0
"""Ample on a busy machine, for what takes milliseconds."""

_PAUSE_S: Final = 0.005


def until(fact: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """Ask again and again, until the answer is true, and give it.

    Raises:
        AssertionError: it was not within the deadline.
    """
    end = time.monotonic() + deadline_s
    while not (found := fact()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        time.sleep(_PAUSE_S)
    return found
