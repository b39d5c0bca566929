"""How much of the machine a qemu-img may take, by resource limits and its niceness."""

import contextlib
import os
import resource
from dataclasses import dataclass
from typing import Final

# The program's own descriptor: above every one that can be made once DESCRIPTORS is the limit,
# so that after exec it can't come back. See seccomp.QEMU_IMG.
PROGRAM_DESCRIPTOR: Final = 700
DESCRIPTORS: Final = 256

_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits on one qemu-img; None leaves what is there.

    No limit on processes, which would count the threads of everybody with that uid, and none on
    file size, which belongs to the policy.
    """

    address_space_bytes: int = 1024 * _MIB  # -m 16 needs 350 MiB with MALLOC_ARENA_MAX=1
    processor_time_s: int | None = None  # a large honest conversion takes hours of it
    niceness: int = 19  # a trivial call during four conversions: 2.5 ms, against 10 ms at 0


CONVERT: Final = Limits()
INFO: Final = Limits(processor_time_s=30)


def raise_descriptors() -> None:
    """Take the soft limit on descriptors to the hard one, to make PROGRAM_DESCRIPTOR possible.

    Raises:
        OSError: setrlimit(2) refused.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def refuse_core_dumps() -> None:
    """Let this process and its children dump no core: it may hold a passphrase. Can't be undone.

    Raises:
        OSError: setrlimit(2) refused.
    """
    # Not 0, which the kernel ignores when core_pattern is a pipe. Source: core(5).
    _lower(resource.RLIMIT_CORE, 1)


def apply(limits: Limits) -> None:
    """Limit the calling process and its children; can't be undone. Lowers, never raises.

    Raises:
        OSError: setrlimit(2) refused.
    """
    _lower(resource.RLIMIT_AS, limits.address_space_bytes)
    _lower(resource.RLIMIT_NOFILE, DESCRIPTORS)
    refuse_core_dumps()
    if limits.processor_time_s is not None:
        _lower(resource.RLIMIT_CPU, limits.processor_time_s)
    current = os.getpriority(os.PRIO_PROCESS, 0)
    # Under systemd the unit's CPUWeight= and Nice= rule, and its filter refuses setpriority(2).
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, max(current, limits.niceness))


def _lower(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    lowest = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (lowest, lowest))
