"""close_range(2): close many descriptors at once."""

from collections.abc import Iterable
from typing import Final

from convertd_daemon.linux import syscall

_LAST: Final = 0xFFFFFFFF


def close_range(first: int, last: int = _LAST) -> None:
    """Close every open descriptor from `first` to `last`, both included.

    Raises:
        OSError: EINVAL, `last` is below `first`.
    """
    syscall.call("close_range", first, last, 0)


def close_all_but(keep: Iterable[int]) -> None:
    """Close every descriptor of the process except these.

    Raises:
        OSError: as close_range(2).
    """
    first = 0
    for descriptor in sorted(set(keep)):
        if descriptor > first:
            close_range(first, descriptor - 1)
        first = descriptor + 1
    close_range(first)
