"""capabilities(7), capget(2) and capset(2): the calling thread's capability sets."""

import ctypes
import enum
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from convertd_daemon.linux import syscall

_VERSION_3: Final = 0x20080522
_HEADER: Final = struct.pack("Ii", _VERSION_3, 0)  # pid 0: the calling thread
_WORDS: Final = "6I"  # effective, permitted, inheritable: the low words, then the high ones


class Capability(enum.IntEnum):
    """The capabilities that this package keeps, drops or queries. Source: capability.h."""

    CHOWN = 0
    DAC_OVERRIDE = 1
    DAC_READ_SEARCH = 2
    FOWNER = 3
    KILL = 5
    SETGID = 6
    SETUID = 7
    SETPCAP = 8
    SYS_PTRACE = 19
    SYS_ADMIN = 21


@dataclass(frozen=True, slots=True, kw_only=True)
class Sets:
    """A thread's three sets, each as capability numbers."""

    effective: frozenset[int] = frozenset()
    permitted: frozenset[int] = frozenset()
    inheritable: frozenset[int] = frozenset()


def _bits(capabilities: Iterable[int]) -> int:
    return sum(1 << capability for capability in set(capabilities))


def _numbers(low: int, high: int) -> frozenset[int]:
    bits = low | high << 32
    return frozenset(number for number in range(64) if bits >> number & 1)


def capget() -> Sets:
    """Read the calling thread's sets.

    Raises:
        OSError: the kernel does not know version 3 of the interface (before Linux 2.6.26).
    """
    data = ctypes.create_string_buffer(struct.calcsize(_WORDS))
    syscall.call("capget", _HEADER, data)
    words = struct.unpack(_WORDS, data.raw)
    return Sets(
        effective=_numbers(words[0], words[3]),
        permitted=_numbers(words[1], words[4]),
        inheritable=_numbers(words[2], words[5]),
    )


def capset(sets: Sets) -> None:
    """Set the calling thread's sets, all three at once.

    Raises:
        OSError: EPERM, it would add a capability that the thread may not gain.
    """
    whole = [_bits(sets.effective), _bits(sets.permitted), _bits(sets.inheritable)]
    low, high = [bits & 0xFFFFFFFF for bits in whole], [bits >> 32 for bits in whole]
    syscall.call("capset", _HEADER, struct.pack(_WORDS, *low, *high))
