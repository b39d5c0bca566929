"""What a call is refused with, as it passes between processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convertd_core import codec, conditions

if TYPE_CHECKING:
    from collections.abc import Callable


def refusal_of(act: Callable[[], object]) -> conditions.Failure | None:
    """Give the condition that a call ends with, as its receiver gets it; None if it succeeds."""
    try:
        act()
    except conditions.ConvertError as error:
        failure = error.failure()
    else:
        return None
    return codec.decode(codec.encode(failure), conditions.Failure)


def reason_of(act: Callable[[], object]) -> str:
    """Give the reason of the condition that a call ends with, or "done"."""
    failure = refusal_of(act)
    return failure.reason if failure else "done"
